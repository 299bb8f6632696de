"""What makes up for dropped channels: ridge regression, folding, change of basis, batch norms recalibrated."""
