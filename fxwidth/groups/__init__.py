"""Channel groups: what is coupled, what is pinned and why; told in words and drawn."""
