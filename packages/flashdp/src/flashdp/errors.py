"""Exceptions of flashdp."""

__all__ = ["PrivacyError"]


class PrivacyError(RuntimeError):
    """Going on would void the privacy guarantee. Never caught, never a warning."""
