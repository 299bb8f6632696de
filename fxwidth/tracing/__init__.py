"""`trace` and `analyze`: front ends in order, and the first analysis of what they make."""
