"""Resizing on several processes at once: one plan, the same tensors, and all or none of them."""
