"""The tape: which ATen ops a module ran, on which values, and what was on record of values."""
