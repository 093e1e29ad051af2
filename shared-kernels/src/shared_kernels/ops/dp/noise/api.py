"""Public functions of the noise step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.dp.noise import constants as k
from shared_kernels.ops.dp.noise import op
from shared_kernels.random.chacha import constants as stream
from shared_kernels.random.chacha.keys import check_key

_TOTAL_DTYPES = (torch.float32, torch.float64)
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_scale(name: str, value: float, zero: bool) -> None:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine:
        raise TypeError(message(name, "a number", value, "convert it with float(...)"))
    if not (k.SMALLEST <= value <= k.LARGEST or (zero and value == 0)):
        expected = "0 or a number" if zero else "a number"
        expected += f" in [2^{math.log2(k.SMALLEST):.0f}, 2^{math.log2(k.LARGEST):.0f}]"
        raise ValueError(message(name, expected, value, "rescale the sums"))


def _in_place(total: Tensor, out: Tensor) -> bool:
    """Return whether the two are the same memory; refuse any other overlap."""
    if total is out:
        return True
    begin, other = total.data_ptr(), out.data_ptr()
    if begin == other and total.dtype == out.dtype:
        return True
    if begin < other + out.nbytes and other < begin + total.nbytes:
        raise ValueError(
            message("out", "total itself, or memory apart from it", out, "allocate another tensor")
        )
    return False


def gaussian_step(
    total: Tensor,
    out: Tensor,
    *,
    key: Tensor,
    step: int,
    uid: int,
    std: float,
    divisor: float,
    start: int = 0,
    domain: int = 0,
    impl: str = "auto",
) -> None:
    """Add secure Gaussian noise to a clipped sum and divide by a public constant.

    ``out = (total + z) / divisor`` with ``z ~ N(0, std^2)``; before the division the *sum*
    ``total + z`` is rounded to a multiple of ``std 2^-20``, so that no low bit of the total
    survives. ``z`` is a pure function of (key, step, uid, domain, element index): shards, devices
    and world sizes agree, and no two elements share a ChaCha20 block position unless all five are
    equal. **Never call it twice with equal ones on different totals: the difference of the results
    would be free of noise.** So ``uid`` must be unique among the parameters: number them.

    Computed in float64. Deterministic, and bit-equal between implementations and devices. Reads
    the total and writes the result once: 8 bytes per float32 element; about 125 integer and 55
    float64 operations per element.

    Args:
        total: float32 or float64 ``(n,)``, contiguous: elements ``start .. start + n`` of the
            row-major order of one parameter. Below ``2^20 std`` in magnitude the sum is formed to
            2^-12 grid steps or better. Infinities and NaN come out as they are.
        out: float32, bfloat16, float16 or float64 ``(n,)``, contiguous, written; may be ``total``.
        key: int32 ``(8,)`` on the CPU, wherever the others are; see `random.chacha.new_key`.
        step: Number of the step in [0, 2^40).
        uid: Number of the parameter in [0, 2^32).
        std: Standard deviation of the noise: 0 (``out = total / divisor``, rounded once), or a
            number in [2^-126, 2^126].
        divisor: Public constant in [2^-126, 2^126].
        start: Index of the first element in the whole parameter; ``start + n`` is at most 2^51.
        domain: What the noise is for, in [0, 2^8): 0 gradients, 1 counts, others as you like.
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.

    Raises:
        TypeError: A tensor has another dtype than listed, or a number is not one.
        ValueError: Shapes, devices, layouts or numbers are out of range, or ``out`` overlaps
            ``total`` without being the same.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    gaussian_steps(
        [total],
        [out],
        key=key,
        step=step,
        uids=[uid],
        stds=[std],
        divisor=divisor,
        starts=[start],
        domain=domain,
        impl=impl,
    )


def gaussian_steps(
    totals: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    key: Tensor,
    step: int,
    uids: Sequence[int],
    stds: Sequence[float],
    divisor: float,
    starts: Sequence[int] | None = None,
    domain: int = 0,
    impl: str = "auto",
) -> None:
    """Do `gaussian_step` for many parameters: on a GPU one launch per combination of dtypes.

    The same bits as one call each. A GPU reads a table of 72 bytes per parameter besides.

    Args:
        totals: One or more totals of one device, see `gaussian_step`.
        outs: As many results, none of which overlaps another or another's total.
        key: See `gaussian_step`, as are ``step``, ``divisor``, ``domain`` and ``impl``.
        step: See ``key``.
        uids: Number of each parameter; unique, unless parts of one parameter are given.
        stds: Standard deviation for each.
        divisor: See ``key``.
        starts: Index of each one's first element in its parameter; None for zeros.
        domain: See ``key``.
        impl: See ``key``.

    Raises:
        TypeError: See `gaussian_step`.
        ValueError: See there; or the lists are not equally long, or empty.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    starts = [0] * len(totals) if starts is None else starts
    for name, given in (("outs", outs), ("uids", uids), ("stds", stds), ("starts", starts)):
        if len(given) != len(totals):
            raise ValueError(
                message(name, f"{len(totals)} of them", len(given), "pass one for each total")
            )
    if not totals:
        raise ValueError(message("totals", "one or more tensors", totals, "leave the call out"))
    check_key(key)
    check_range("step", step, 0, 1 << stream.STEP_BITS, "count steps from 0")
    check_range("domain", domain, 0, 1 << stream.DOMAIN_BITS, "use 0 for gradients, 1 for counts")
    _check_scale("divisor", divisor, zero=False)
    device = totals[0].device
    sources, used = [], []
    for total, out, uid, std, start in zip(totals, outs, uids, stds, starts, strict=True):
        check_tensor("total", total, dtypes=_TOTAL_DTYPES, shape=(None,), device=device)
        check_tensor("out", out, dtypes=_OUT_DTYPES, shape=total.shape, device=device)
        check_range("uid", uid, 0, 1 << 32, "number the parameters from 0")
        room = stream.MAX_ELEMENTS - total.shape[0] + 1
        check_range("start", start, 0, room, "pass an element index")
        _check_scale("std", std, zero=True)
        if total.shape[0]:
            sources.append(None if _in_place(total, out) else total)
            used.append((out, uid, float(std), start))
    if used:
        some, uids, stds, starts = (list(column) for column in zip(*used, strict=True))
        op.gaussian_steps_(
            some, sources, key, step, uids, domain, stds, float(divisor), starts, impl
        )
