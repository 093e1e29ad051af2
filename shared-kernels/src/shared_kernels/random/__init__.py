"""Counter-based noise: every element is a closed form of (seed, parameter, direction, index)."""

from shared_kernels.random.api import noise
from shared_kernels.random.reference import derive_seed, derive_seeds, param_uid, philox4x32

__all__ = ["derive_seed", "derive_seeds", "noise", "param_uid", "philox4x32"]
