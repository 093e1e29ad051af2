"""Errors of this package."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A model of a family without a table, or what its plain class cannot express."""


class UnknownTensorError(UnsupportedModelError):
    """A tensor whose axes no table tells."""


class ResumeError(ValueError):
    """What was begun cannot be gone on with: another plan or source."""


class VerificationError(RuntimeError):
    """What was written is not what it should be."""
