"""Registration of the noise op."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.random import reference
from shared_kernels.random.constants import TILE

_U64 = (1 << 64) - 1


def signed_words(value: int) -> tuple[int, int]:
    """Return the low and the high 32 bits of ``value`` as signed integers.

    Triton would otherwise compile one kernel for words below 2^31 and another for the rest.
    """
    low, high = value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000


def _reference(out: Tensor, seed: int, uid: int, direction: int, dist: str, start: int) -> None:
    out.copy_(
        reference.noise(
            out.numel(),
            seed=seed & _U64,
            uid=uid,
            direction=direction,
            dist=dist,
            start=start,
            device=out.device,
        )
    )


def _numba(out: Tensor, seed: int, uid: int, direction: int, dist: str, start: int) -> None:
    from shared_kernels.random import cpu

    cpu.noise_(out, seed=seed & _U64, uid=uid, direction=direction, dist=dist, start=start)


def _triton(out: Tensor, seed: int, uid: int, direction: int, dist: str, start: int) -> None:
    from shared_kernels.random import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.noise_kernel
    first, last = start // TILE, -(-(start + out.numel()) // TILE)
    with torch.cuda.device_of(out):
        kernel[(last - first,)](
            out,
            out.numel(),
            first,
            start % TILE,
            *signed_words(seed),
            signed_words(uid)[0],
            direction,
            GAUSSIAN=dist == "gaussian",
            WIDE=True,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _fake(out: Tensor, seed: int, uid: int, direction: int, dist: str, start: int) -> None:
    return None


noise_ = declare(
    "noise_(Tensor(a!) out, SymInt seed, SymInt uid, SymInt direction, str dist, SymInt start)"
    " -> ()",
    implementations={"reference": _reference, "numba": _numba, "triton": _triton},
    fake=_fake,
)
