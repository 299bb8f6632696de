"""Channel groups: what is coupled, what is pinned and why, as text and as a drawing."""
