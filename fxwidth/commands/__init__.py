"""The `fxwidth` command but for `train`: each command parses, calls public functions, and prints."""
