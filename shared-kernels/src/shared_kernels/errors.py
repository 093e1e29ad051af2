"""Exceptions of the package. Bad arguments raise ValueError or TypeError, as elsewhere."""


class KernelUnavailableError(RuntimeError):
    """The implementation asked for cannot run here (no Triton, wrong device, no numba)."""


class FallbackError(RuntimeError):
    """A slower implementation would have been used while ``SHARED_KERNELS_STRICT=1``."""
