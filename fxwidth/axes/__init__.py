"""What dimensions are made of: factors, their unification, index maps, polynomials of widths. Knows no torch."""
