"""Errors of this package."""


class ConvergenceError(RuntimeError):
    """Something that is defined by an iteration was not reached; the message says what and why."""
