"""`save` and `load`: an evolved graph in a file, as tensors with a record, as an exported program, or as a pickle."""
