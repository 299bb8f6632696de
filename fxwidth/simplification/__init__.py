"""Graphs with fewer nodes that do the same: dead code, identities, batch norms folded into what writes to them."""
