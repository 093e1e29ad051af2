"""Registration of the noise step."""

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_kernels._autotune import choose
from shared_kernels._library import declare
from shared_kernels.ops.dp.noise import reference
from shared_kernels.random.chacha.constants import SEGMENT
from shared_kernels.random.chacha.reference import stream_nonce
from shared_kernels.random.op import signed_words

#: Launch configurations, the default first.
CONFIGS = tuple({"num_warps": warps} for warps in (4, 8, 2))


def _numba(*args: Any) -> None:
    from shared_kernels.ops.dp.noise import cpu

    cpu.gaussian_step(*args)


def double_bits(value: float) -> int:
    """Return the bit pattern of a float64 as a signed 64-bit integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _triton(
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
    from shared_kernels.ops.dp.noise import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.gaussian_step_kernel
    first, last = start // SEGMENT, -(-(start + out.numel()) // SEGMENT)
    to_grid, from_grid = reference.scales(std, divisor) if std else (1.0, divisor)
    nonce = stream_nonce(step, uid, domain, 0)

    def launch(config: Mapping[str, int], out: Tensor) -> None:
        kernel[(last - first,)](
            out if total is None else total,
            out,
            out.numel(),
            first,
            start % SEGMENT,
            *(signed_words(word)[0] for word in nonce),
            *key.tolist(),
            double_bits(to_grid),
            double_bits(from_grid),
            NOISE=std != 0,
            enable_fp_fusion=False,
            **config,
        )

    def trial(config: Mapping[str, int]) -> None:
        # in place the total would change, so candidates are timed on a copy
        launch(config, out.clone() if total is None else out)

    with torch.cuda.device_of(out):
        kind = "noise" if std else "divide"
        launch(choose("dp_gaussian_step", kind, CONFIGS, trial), out)


def _fake(*args: Any) -> None:
    return None


gaussian_step_ = declare(
    "dp_gaussian_step_(Tensor(a!) out, Tensor? total, Tensor key, SymInt step, SymInt uid,"
    " SymInt domain, float std, float divisor, SymInt start) -> ()",
    implementations={
        "reference": reference.gaussian_step,
        "numba": _numba,
        "triton": _triton,
    },
    fake=_fake,
)
