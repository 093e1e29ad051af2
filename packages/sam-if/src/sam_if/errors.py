"""Errors of this package."""


class ConvergenceError(RuntimeError):
    """Something that is defined by an iteration was not reached; the message says what and why."""


class TrajectoryError(RuntimeError):
    """A run that is not what its record says; the message names the step and what differs."""


class UnsupportedOptimizerError(ValueError):
    """An optimizer whose steps have no adjoint here; the message says which have."""


class DerivativeError(RuntimeError):
    """Second derivatives that are not those of the losses; the message says by how much."""
