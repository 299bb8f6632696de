"""The one error a user meets, and the one warning."""


class FxwidthError(Exception):
    """Something fxwidth was given cannot be used; the message names the place, what was received and the remedy."""


class FxwidthWarning(UserWarning):
    """Something fxwidth made does less than what it was made from; the message names the place and what helps."""
