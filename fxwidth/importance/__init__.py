"""What a width costs in the loss."""
