"""The graph, its modules and its tensors at new sizes, and how all of it is taken back."""
