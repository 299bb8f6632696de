"""Modules of the classes that graphs were traced from: which widths they hold, and how they get those of a graph."""
