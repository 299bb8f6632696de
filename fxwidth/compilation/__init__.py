"""Resized graphs under `torch.compile`: code for each state of a graph, and a backend that resizes what is captured."""
