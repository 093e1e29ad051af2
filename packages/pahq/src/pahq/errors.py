"""Errors of this package."""


class UnsupportedModelError(ValueError):
    """A model whose residual stream cannot be taken apart; the message says which part."""
