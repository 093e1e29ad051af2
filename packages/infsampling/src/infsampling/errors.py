"""Exceptions and warnings of infsampling."""

__all__ = ["SamplingWarning", "UnsupportedModelError"]


class UnsupportedModelError(ValueError):
    """The model has a part that the sampler cannot serve."""


class SamplingWarning(UserWarning):
    """Samples came out in a way that is hardly meant."""
