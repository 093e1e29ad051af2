"""The noise step in plain torch: the definition.

With ``z`` a standard normal of the secure stream and ``g = std 2^-20``, in float64::

    out = g floor(total / g + 2^20 z + 1/2) / divisor

that is ``(total + std z) / divisor``, the sum rounded to the grid ``g``. Each operation is rounded
on its own: ``total * (2^20 / std)``, plus ``2^20 z``, plus one half, floor, times
``std 2^-20 / divisor``, to float32 (unless the result is float64), to the result's dtype. With
``std = 0`` it is ``total / divisor``. Source: the Gaussian mechanism (Dwork and Roth, "The
algorithmic foundations of differential privacy", 2014, appendix A), discretised after the addition
against the attack of Mironov ("On significance of the least significant bits for differential
privacy", CCS 2012).
"""

import torch
from torch import Tensor

from shared_kernels.ops.dp.noise.constants import GRID
from shared_kernels.random.chacha.keys import key_words
from shared_kernels.random.chacha.reference import standard_normals

#: Elements worked on at a time; bounds the temporaries to a few hundred MiB.
_CHUNK = 1 << 18


def scales(std: float, divisor: float) -> tuple[float, float]:
    """Return what total and result are multiplied by: ``2^20 / std``, ``std 2^-20 / divisor``."""
    return GRID / std, std / GRID / divisor


def store(out: Tensor, value: Tensor) -> None:
    """Round float64 values to the dtype of ``out``, through float32 unless it is float64."""
    out.copy_(value if out.dtype == torch.float64 else value.float())


def gaussian_step(
    out: Tensor,
    total: Tensor | None,
    key: Tensor,
    step: int,
    uid: int,
    domain: int,
    std: float,
    divisor: float,
    start: int,
) -> None:
    """Write one noised mean; arguments are those of the op (see `op.py`), for one parameter."""
    total = out if total is None else total
    for low in range(0, out.numel(), _CHUNK):
        chunk = slice(low, low + _CHUNK)
        value = total[chunk].double()
        if std == 0:
            # a tensor, because CUDA multiplies by the reciprocal of a number
            store(out[chunk], value / torch.full_like(value, divisor))
            continue
        z = standard_normals(
            value.numel(),
            key=key_words(key),
            step=step,
            uid=uid,
            domain=domain,
            start=start + low,
            device=out.device,
        )
        to_grid, from_grid = scales(std, divisor)
        steps = (value * to_grid + z * GRID + 0.5).floor()
        store(out[chunk], steps * from_grid)
