"""Groups whose basis is free to change, and where their channels lie."""
