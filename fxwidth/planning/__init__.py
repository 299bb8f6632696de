"""Widths under limits and budgets."""
