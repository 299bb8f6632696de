"""The transaction of a resize: edits of tensors, graph and optimizer, committed together."""
