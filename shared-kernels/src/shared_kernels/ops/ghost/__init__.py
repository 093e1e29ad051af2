"""Ghost operations: per-sample gradients of linear layers are used without being formed."""

from shared_kernels.ops.ghost.api import (
    ghost_dot,
    ghost_dot_low_rank,
    kron_cov_,
    kron_sketch,
    pairwise_ghost,
    pairwise_way,
)

__all__ = [
    "ghost_dot",
    "ghost_dot_low_rank",
    "kron_cov_",
    "kron_sketch",
    "pairwise_ghost",
    "pairwise_way",
]
