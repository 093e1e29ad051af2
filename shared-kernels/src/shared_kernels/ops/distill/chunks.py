"""The streaming core: logits of some rows by the matrix library, one pass over them, two products.

A chunk is C rows of the teacher. Its logits serve every student row that names one of them,
whatever head it belongs to. What a pass over the rows does is given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from shared_kernels.ops.distill.reference import STATISTICS, accumulate_dtype

#: ``run(logits, slope, *given)`` passes over some rows: it writes statistics and, unless ``slope``
#: is None, the logits' gradient, and may leave anything in ``logits``.
RowPass = Callable[..., None]

#: Bytes of logits and of their gradient that exist at a time, by device.
BUDGET: Final = {"cuda": 2304 << 20, "cpu": 64 << 20}
#: Rows of a chunk are a multiple of this many where the budget allows as many.
STEP: Final = {"cuda": 128, "cpu": 16}
#: Rows of the head whose gradient is added up at a time where the library cannot do it.
_PART: Final = 16384


def chunk_rows(chunk: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return ``chunk``, or if it is 0 as many rows as the budget has room for."""
    if chunk:
        return chunk
    size = accumulate_dtype(dtype).itemsize
    # two blocks of logits, and a gradient where it does not take the student's place
    row = vocabulary * (2 * size + (dtype.itemsize if dtype.itemsize < size else 0))
    rows, step = BUDGET[device.type] // row, STEP[device.type]
    return max(1, rows // step * step if rows > step else rows)


def widened(x: Tensor) -> Tensor:
    """Return x as the products take it: CPUs cannot multiply 16 bits into float32."""
    return x if x.is_cuda else x.to(accumulate_dtype(x.dtype))


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a b``, without its sums being rounded to 16 bits."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch adds a product of 16 bits to float32; versions differ."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a^T b`` to a sum of float32, part by part where the library cannot add to it."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b)
    elif _adds_in_place(a.device, a.dtype):
        torch.addmm(total, a.T, b, out_dtype=total.dtype, out=total)
    else:
        for low in range(0, len(total), _PART):
            part = total[low : low + _PART]
            part += torch.mm(a[:, low : low + _PART].T, b, out_dtype=total.dtype)


class HeadRows(NamedTuple):
    """Which of a head's rows the teacher's chunks serve.

    Attributes:
        rows: The head's rows in the order of their teacher's; None is all of them as they are.
        place: Place of each one's teacher row among those that are needed.
        bounds: Where the rows of each chunk begin, and the end.
    """

    rows: Tensor | None
    place: Tensor
    bounds: list[int]


def plan(rows: Tensor, sizes: list[int], teachers: int, chunk: int) -> tuple[Tensor, list]:
    """Return the teacher rows that are needed, ascending, and the `HeadRows` of each head."""
    needed = torch.zeros(teachers, dtype=torch.bool, device=rows.device)
    needed[rows[rows >= 0]] = True
    order = needed.nonzero()[:, 0]
    places = needed.cumsum(0) - 1
    cuts = torch.arange(0, len(order) + chunk, chunk, device=rows.device)
    heads = []
    for part in rows.split(sizes):
        own = (part >= 0).nonzero()[:, 0]
        place = places[part[own]]
        ascending = not bool((place.diff() < 0).any())
        if not ascending:
            place, shuffle = place.sort(stable=True)
            own = own[shuffle]
        whole = ascending and len(own) == len(part)
        bounds = torch.searchsorted(place, cuts).tolist()
        heads.append(HeadRows(None if whole else own, place, bounds))
    return order, heads


def take(x: Tensor, rows: Tensor | None, low: int, high: int) -> Tensor:
    """Return the rows ``low`` to ``high`` of those chosen; None is all of them."""
    return x[low:high] if rows is None else x[rows[low:high]]


class Gradients:
    """Buffers of a student's logits and of the gradients that come from them."""

    def __init__(
        self, weight: Tensor, used: int, chunk: int, grad_hidden: bool, grad_weight: bool
    ) -> None:
        dtype = accumulate_dtype(weight.dtype)
        self.head = widened(weight[:used])
        self.logits = weight.new_empty(chunk, used, dtype=dtype)
        self.wanted = (grad_hidden, grad_weight)
        self.slope = None
        if grad_hidden or grad_weight:
            # in place where it has the logits' dtype
            self.slope = self.logits
            if weight.dtype != dtype:
                self.slope = torch.empty_like(self.logits, dtype=weight.dtype)
        self.d_weight = weight.new_zeros(weight.shape if grad_weight else (0,), dtype=dtype)

    def rows(
        self,
        run: RowPass,
        given: tuple[Any, ...],
        hidden: Tensor,
        d_hidden: Tensor | None,
        rows: Tensor | None,
        low: int,
        high: int,
    ) -> None:
        """Make the logits of some rows, pass over them, and multiply their gradient."""
        states = widened(take(hidden, rows, low, high))
        logits = self.logits[: high - low]
        multiply(states, self.head.T, logits)
        slope = None if self.slope is None else self.slope[: high - low]
        run(logits, slope, *given)
        if slope is None:
            return
        slope = widened(slope)
        if d_hidden is not None:
            target = d_hidden[low:high] if rows is None else d_hidden.new_empty(states.shape)
            multiply(slope, self.head, target)
            if rows is not None:
                d_hidden[rows[low:high]] = target
        if self.wanted[1]:
            accumulate(self.d_weight[: len(self.head)], slope, states)


def linear_distillation(
    run: RowPass,
    hidden: list[Tensor],
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    rows: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    chunk: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute what `reference.linear_distillation` defines, chunk by chunk.

    ``run`` is given ``(teacher, place, labels, lm_weight, kd_weight, temperature, ignore_index,
    stats)``: the teacher's logits of a chunk and which of them each row has. It must leave them as
    they are, because other heads need them.
    """
    # kernels take one number after the other
    labels = labels.contiguous()
    used = min(len(weight), len(teacher_weight))
    chunk = chunk_rows(chunk, used, weight.dtype, weight.device)
    sizes = [len(part) for part in hidden]
    needed, heads = plan(rows, sizes, len(teacher_hidden), chunk)
    chunk = max(1, min(chunk, len(needed)))
    dtype = accumulate_dtype(weight.dtype)
    gradients = Gradients(weight, used, chunk, grad_hidden, grad_weight)
    matrix = widened(teacher_weight[:used])
    teacher = weight.new_empty(chunk, used, dtype=dtype)
    every = None if len(needed) == len(teacher_hidden) else needed
    stats = weight.new_zeros(sum(sizes), len(STATISTICS), dtype=dtype)
    d_hidden = [part.new_zeros(part.shape, dtype=dtype) for part in hidden if grad_hidden]
    starts = [sum(sizes[:head]) for head in range(len(sizes))]
    for index, low in enumerate(range(0, len(needed), chunk)):
        states = widened(take(teacher_hidden, every, low, min(low + chunk, len(needed))))
        logits = teacher[: len(states)]
        multiply(states, matrix.T, logits)
        for head, (own, place, bounds) in enumerate(heads):
            # a head may name a teacher's row many times
            for first in range(bounds[index], bounds[index + 1], chunk):
                last = min(first + chunk, bounds[index + 1])
                span = (own, first, last)
                part = slice(starts[head], starts[head] + sizes[head])
                columns = [take(x[part], *span) for x in (labels, lm_weight, kd_weight)]
                found = stats.new_empty(last - first, len(STATISTICS))
                here = place[first:last] - low
                given = (logits, here, *columns, temperature, ignore_index, found)
                d_part = d_hidden[head] if grad_hidden else None
                gradients.rows(run, given, hidden[head], d_part, *span)
                if own is None:
                    stats[part][first:last] = found
                else:
                    stats[part][own[first:last]] = found
    return stats, d_hidden, gradients.d_weight


def sparse_distillation(
    run: RowPass,
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    active: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    tail: bool,
    chunk: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.sparse_distillation` defines, chunk by chunk.

    ``run`` is given ``(indices, log_probs, labels, lm_weight, kd_weight, temperature, ignore_index,
    tail, stats)``.
    """
    dtype, vocabulary = accumulate_dtype(weight.dtype), len(weight)
    rows = active.nonzero()[:, 0]
    own = None if len(rows) == len(hidden) else rows
    chunk = chunk_rows(chunk, vocabulary, weight.dtype, weight.device)
    chunk = max(1, min(chunk, len(rows)))
    gradients = Gradients(weight, vocabulary, chunk, grad_hidden, grad_weight)
    stats = hidden.new_zeros(len(hidden), len(STATISTICS), dtype=dtype)
    d_hidden = hidden.new_zeros(hidden.shape if grad_hidden else (0,), dtype=dtype)
    # kernels take one number after the other
    columns = (indices, log_probs.to(dtype), labels.contiguous(), lm_weight, kd_weight)
    for low in range(0, len(rows), chunk):
        span = (own, low, min(low + chunk, len(rows)))
        given = [take(x, *span) for x in columns]
        found = stats.new_empty(span[2] - low, len(STATISTICS))
        given = (*given, temperature, ignore_index, tail, found)
        gradients.rows(run, given, hidden, d_hidden if grad_hidden else None, *span)
        stats[rows[low : span[2]]] = found
    return stats, d_hidden, gradients.d_weight
