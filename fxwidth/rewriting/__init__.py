"""Carrying a resize out: parameters, literals of the graph, attributes of modules, optimizer state."""
