"""What a loss asks of new channels: moments of what would write them with the gradient at what would read them."""
