"""The whole road: in one call, or again and again while the network trains."""
