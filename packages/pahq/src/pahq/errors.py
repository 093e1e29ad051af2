"""Errors of this package."""


class UnsupportedModelError(ValueError):
    """A model whose residual stream cannot be taken apart; the message says which part."""


class ResumeError(ValueError):
    """A search cannot go on from what was begun otherwise; the message says what differs."""
