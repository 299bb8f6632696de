"""The version of this package, which files tell too."""

__version__ = "0.1.0"
