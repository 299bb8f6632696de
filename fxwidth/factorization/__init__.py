"""Layers whose own rank is low as two layers: which ones, of which rank, and the change of the graph."""
