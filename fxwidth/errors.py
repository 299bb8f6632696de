"""The one error a user meets, and the one warning."""


class FxwidthError(Exception):
    """Something fxwidth was given cannot be used; the message names the place, what was received and the remedy.

    Example:
        >>> fxwidth.trace(3)
        Traceback (most recent call last):
        fxwidth.errors.FxwidthError: trace takes an nn.Module or a GraphModule, but received int.
    """


class FxwidthWarning(UserWarning):
    """Something fxwidth made does less than what it was made from; the message names the place and what helps.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", fxwidth.FxwidthWarning)  # to have such a trace refused
        >>> warnings.resetwarnings()
    """
