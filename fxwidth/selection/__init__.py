"""Which channels are kept, and the error at every width."""
