"""Streams that are joined only by copies of channels get widths of their own: each copy becomes a table."""
