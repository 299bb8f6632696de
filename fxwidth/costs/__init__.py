"""What a network costs as polynomials of its widths: parameters, operations, memory, latency."""
