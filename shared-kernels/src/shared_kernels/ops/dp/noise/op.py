"""Registration of the noise step."""

import struct
from collections.abc import Callable, Mapping, Sequence
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


def _each(step_of: Callable[..., None]) -> Callable[..., None]:
    """Return an implementation that takes the parameters one after the other."""

    def run(
        outs: Sequence[Tensor],
        totals: Sequence[Tensor | None],
        key: Tensor,
        step: int,
        uids: Sequence[int],
        domain: int,
        stds: Sequence[float],
        divisor: float,
        starts: Sequence[int],
    ) -> None:
        for out, total, uid, std, start in zip(outs, totals, uids, stds, starts, strict=True):
            step_of(out, total, key, step, uid, domain, std, divisor, start)

    return run


def _numba(*args: Any) -> None:
    from shared_kernels.ops.dp.noise import cpu

    cpu.gaussian_step(*args)


def double_bits(value: float) -> int:
    """Return the bit pattern of a float64 as a signed 64-bit integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _table(
    outs: Sequence[Tensor],
    totals: Sequence[Tensor | None],
    uids: Sequence[int],
    stds: Sequence[float],
    divisor: float,
    starts: Sequence[int],
) -> tuple[Tensor, int]:
    """Return what the kernel must know of each parameter, and how many programs it takes."""
    rows, programs = [], 0
    for out, total, uid, std, start in zip(outs, totals, uids, stds, starts, strict=True):
        to_grid, from_grid = reference.scales(std, divisor) if std else (1.0, divisor)
        first, last = start // SEGMENT, -(-(start + out.numel()) // SEGMENT)
        source = out if total is None else total
        # in the order of `triton.gaussian_steps_kernel`
        rows.append(
            [
                programs,
                source.data_ptr(),
                out.data_ptr(),
                out.numel(),
                first,
                start % SEGMENT,
                signed_words(uid)[0],
                double_bits(to_grid),
                double_bits(from_grid),
            ]
        )
        programs += last - first
    device = outs[0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), programs


def _triton(
    outs: Sequence[Tensor],
    totals: Sequence[Tensor | None],
    key: Tensor,
    step: int,
    uids: Sequence[int],
    domain: int,
    stds: Sequence[float],
    divisor: float,
    starts: Sequence[int],
) -> None:
    from shared_kernels.ops.dp.noise import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.gaussian_steps_kernel
    words = [signed_words(word)[0] for word in stream_nonce(step, 0, domain, 0)[:2]]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (out, total) in enumerate(zip(outs, totals, strict=True)):
        source = out if total is None else total
        alike.setdefault((source.dtype, out.dtype, stds[i] != 0), []).append(i)

    def launch(config: Mapping[str, int], outs: Sequence[Tensor], some: list[int]) -> None:
        of = lambda values: [values[i] for i in some]  # noqa: E731
        table, programs = _table(of(outs), of(totals), of(uids), of(stds), divisor, of(starts))
        out, total = outs[some[0]], totals[some[0]]
        kernel[(programs,)](
            # these two for their dtypes
            out if total is None else total,
            out,
            table,
            len(some),
            *words,
            *key.tolist(),
            BITS=len(some).bit_length(),
            NOISE=stds[some[0]] != 0,
            enable_fp_fusion=False,
            **config,
        )

    with torch.cuda.device_of(outs[0]):
        for (_, _, noise), some in alike.items():

            def trial(config: Mapping[str, int], some: list[int] = some) -> None:
                # in place the totals would change, so candidates are timed on copies
                pairs = enumerate(zip(outs, totals, strict=True))
                launch(
                    config,
                    [o.clone() if t is None and i in some else o for i, (o, t) in pairs],
                    some,
                )

            kind = "noise" if noise else "divide"
            launch(choose("dp_gaussian_step", kind, CONFIGS, trial), outs, some)


def _fake(*args: Any) -> None:
    return None


gaussian_steps_ = declare(
    "dp_gaussian_steps_(Tensor(a!)[] outs, Tensor?[] totals, Tensor key, SymInt step,"
    " SymInt[] uids, SymInt domain, float[] stds, float divisor, SymInt[] starts) -> ()",
    implementations={
        "reference": _each(reference.gaussian_step),
        "numba": _each(_numba),
        "triton": _triton,
    },
    fake=_fake,
)
