"""The one error a user meets."""


class FxwidthError(Exception):
    """Something fxwidth was given cannot be used; the message names the place, what was received and the remedy."""
