"""Oracles: the resized graph against the recorded ops at the new sizes."""
