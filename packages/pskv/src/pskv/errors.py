"""Exceptions and warnings of pskv."""

__all__ = ["RetokenizationWarning", "StalePrefixError", "UnsupportedModelError"]


class UnsupportedModelError(ValueError):
    """The model has a part that cannot share a prefix, or is in a state that forbids it."""


class StalePrefixError(RuntimeError):
    """The model has changed since the prefix was computed."""


class RetokenizationWarning(UserWarning):
    """A text would be cut into other tokens if it were joined to what stands before it."""
