"""Axes propagated over the tape: pins, roles of parameters, replay at other widths."""
