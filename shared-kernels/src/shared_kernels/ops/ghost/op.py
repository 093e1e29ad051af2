"""Registration of the ghost operations."""

from typing import Any

from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.dp.reference import accumulate_dtype
from shared_kernels.ops.ghost import launch, reference


def _fake_dot(x: Tensor, d: Tensor, y: Tensor, *args: Any) -> Tensor:
    return x.new_empty((y.shape[0], x.shape[0]), dtype=accumulate_dtype(x.dtype))


def _fake_pairs(x1: Tensor, d1: Tensor, x2: Tensor, *args: Any) -> Tensor:
    return x1.new_empty((x1.shape[0], x2.shape[0]), dtype=accumulate_dtype(x1.dtype))


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_sketch(
    x: Tensor, d: Tensor, seed: int, out_rank: int, in_rank: int, mask: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], out_rank * in_rank), dtype=accumulate_dtype(x.dtype))


ghost_dot = declare(
    "ghost_dot(Tensor x, Tensor d, Tensor y, Tensor? mask) -> Tensor",
    implementations={"reference": reference.ghost_dot, "triton": launch.ghost_dot},
    fake=_fake_dot,
    unsupported=launch.unsupported,
)
ghost_dot_low_rank = declare(
    "ghost_dot_low_rank(Tensor x, Tensor d, Tensor u, Tensor v, Tensor? mask) -> Tensor",
    implementations={
        "reference": reference.ghost_dot_low_rank,
        "triton": launch.ghost_dot_low_rank,
    },
    fake=_fake_dot,
    unsupported=launch.unsupported,
)
pairwise_ghost = declare(
    "pairwise_ghost(Tensor x1, Tensor d1, Tensor x2, Tensor d2, Tensor? mask1, Tensor? mask2,"
    " str way) -> Tensor",
    implementations={"reference": reference.pairwise_ghost, "triton": launch.pairwise_ghost},
    fake=_fake_pairs,
    unsupported=launch.unsupported,
)
kron_cov_ = declare(
    "kron_cov_(Tensor x, Tensor d, Tensor(a!) a, Tensor(b!) s, Tensor? mask, Tensor? weights)"
    " -> ()",
    implementations={"reference": reference.kron_cov_, "triton": launch.kron_cov_},
    fake=_fake_nothing,
    unsupported=launch.unsupported,
)
kron_sketch = declare(
    "kron_sketch(Tensor x, Tensor d, SymInt seed, SymInt out_rank, SymInt in_rank, Tensor? mask)"
    " -> Tensor",
    implementations={"reference": reference.kron_sketch, "triton": launch.kron_sketch},
    fake=_fake_sketch,
    unsupported=launch.unsupported,
)
