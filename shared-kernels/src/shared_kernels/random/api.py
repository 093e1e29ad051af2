"""Public functions of the counter-based noise."""

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, check_range
from shared_kernels.random import constants as k
from shared_kernels.random import op

DISTRIBUTIONS = ("gaussian", "rademacher")


def as_int64(seed: int) -> int:
    """Return the signed 64-bit integer with the same bits as ``seed`` modulo 2^64."""
    return ((seed + (1 << 63)) % (1 << 64)) - (1 << 63)


def noise(
    numel: int,
    *,
    seed: int,
    uid: int,
    direction: int = 0,
    dist: str = "gaussian",
    start: int = 0,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Tensor:
    """Draw elements ``start .. start + numel`` of the noise of one parameter.

    The value of an element depends on (seed, uid, direction, dist) and its index only, so slices,
    shards and devices agree bit for bit. Deterministic. Writes 4 bytes and computes about 40
    integer and 25 floating-point operations per element (gaussian).

    Args:
        numel: Number of elements.
        seed: Step seed, taken modulo 2^64; see `derive_seed`.
        uid: Parameter identifier in [0, 2^32); see `param_uid`.
        direction: Index of the perturbation direction in [0, 2^24).
        dist: ``gaussian`` (mean 0, variance 1) or ``rademacher`` (+1 or -1).
        start: Index of the first element in the whole parameter.
        device: Where to create the result.
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.

    Returns:
        float32 ``(numel,)``.

    Raises:
        ValueError: An argument is out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_choice("dist", dist, DISTRIBUTIONS)
    check_range("numel", numel, 0, 1 << 62, "pass the number of elements")
    check_range("start", start, 0, 1 << 62, "pass an element index")
    check_range("uid", uid, 0, 1 << 32, "use param_uid(name)")
    check_range("direction", direction, 0, k.MAX_DIRECTION, "number directions from 0")
    out = torch.empty(numel, dtype=torch.float32, device=device)
    if numel:
        op.noise_(out, as_int64(seed), uid, direction, dist, start, impl)
    return out
