"""Running a torch module and leaving it as it was: pytrees, tensor slots, module state, fake tensors, contexts."""
