"""Checks of the arguments, and what is made of them before an op sees them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, check_range, check_tensor, message

if TYPE_CHECKING:
    from collections.abc import Sequence

_NARROW: Final = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS: Final = (*_NARROW, torch.float64)


def check_head(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    name: str | None = None,
    *,
    count: int | None = None,
    student: Tensor | None = None,
) -> None:
    """Refuse what is no head, does not fit its states, or a teacher that does not fit the student.

    Args:
        prefix: Of the arguments' names.
        hidden: The states.
        weight: The head.
        name: Of the states, if it is not the prefix and ``hidden``.
        count: How many states there must be.
        student: Its states, whose device and precision a teacher must have.
    """
    name = name or f"{prefix}hidden"
    dtypes, device = _FLOATS, None
    if student is not None:
        dtypes = (torch.float64,) if student.dtype == torch.float64 else _NARROW
        device = student.device
    shape = (count, None)
    check_tensor(name, _outside(hidden), dtypes=dtypes, shape=shape, device=device, strided=True)
    check_tensor(
        f"{prefix}weight",
        _outside(weight),
        dtypes=(hidden.dtype,),
        shape=(None, hidden.shape[1]),
        device=hidden.device,
        strided=True,
    )
    if not weight.shape[0]:
        remedy = "pass the head's weight"
        raise ValueError(message(f"{prefix}weight", "at least one token", weight, remedy))


def _outside(x: Tensor) -> Tensor:
    """Return x outside autograd, which the ops do not see; what is no tensor stays."""
    return x.detach() if isinstance(x, Tensor) else x


def check_labels(labels: Tensor, hidden: Tensor, name: str = "labels") -> None:
    """Refuse labels that do not fit the states; the op looks at their values."""
    check_tensor(
        name, labels, dtypes=(torch.int64,), shape=hidden.shape[:1], device=hidden.device,
        strided=True,
    )  # fmt: skip


def check_rows(rows: Tensor, hidden: Tensor, name: str) -> None:
    """Refuse indices that do not fit the states; the op looks at their values."""
    check_labels(rows, hidden, name)


def check_options(
    kd_weights: Sequence[float],
    head_weights: Sequence[float],
    temperature: float,
    reduction: str,
    num_items: float | Tensor | None,
    chunk_size: int | None,
) -> None:
    """Refuse options that are out of range."""
    for value in kd_weights:
        if not 0 <= value <= 1:
            remedy = "0 is the language model's loss alone, 1 distillation alone"
            raise ValueError(message("kd_weight", "a number in [0, 1]", value, remedy))
    for value in head_weights:
        if not 0 <= value < math.inf:
            raise ValueError(message("head_weights", "numbers >= 0", value, "1 is usual"))
    if not 0 < temperature < math.inf:
        raise ValueError(message("temperature", "a positive number", temperature, "1 is usual"))
    check_choice("reduction", reduction, ("mean", "sum"))
    if num_items is not None:
        if reduction == "sum":
            remedy = "leave reduction out"
            raise ValueError(message("num_items", "None with reduction='sum'", num_items, remedy))
        if isinstance(num_items, Tensor):
            if num_items.dim():
                remedy = "pass one number"
                raise ValueError(message("num_items", "a 0-dimensional tensor", num_items, remedy))
        elif not num_items > 0:
            remedy = "pass the number of labels of a step"
            raise ValueError(message("num_items", "a positive number", num_items, remedy))
    if chunk_size is not None:
        check_range("chunk_size", chunk_size, 1, 1 << 31, "leave it out to have it chosen")


def check_sparse(
    indices: Tensor, log_probs: Tensor | None, weights: Tensor | None, hidden: Tensor
) -> Tensor:
    """Return the logarithms of what is known of a teacher, after a check that it fits."""
    device, count = hidden.device, hidden.shape[0]
    integers = (torch.int32, torch.int64)
    check_tensor("indices", indices, dtypes=integers, shape=(count, None), device=device)
    given = log_probs if weights is None else weights
    if given is None or (log_probs is not None and weights is not None):
        remedy = "pass log_probs of top-k, or weights of sample_teacher and log_probs=None"
        got = None if given is None else "both"
        raise ValueError(message("log_probs", "one of log_probs and weights", got, remedy))
    name = "log_probs" if weights is None else "weights"
    check_tensor(name, given, dtypes=_FLOATS, shape=indices.shape, device=device)
    if not indices.shape[1]:
        raise ValueError(message("indices", "at least one token a row", indices, "cache some"))
    return given if weights is None else given.log()


def divisor(
    mask: Tensor, reduction: str, num_items: float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return what sums over the rows of the mask are divided by; never 0."""
    if num_items is not None:
        return torch.as_tensor(num_items, dtype=dtype, device=mask.device)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=mask.device)
    return mask.sum().clamp_min(1).to(dtype)


def normalised(lm_weight: Tensor, kd_weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the largest weight of a row, and the weights divided by it.

    The logits' gradient is then of the order of 1 whatever it is divided by, which float16 needs.
    """
    floor = lm_weight.new_full((1,), torch.finfo(lm_weight.dtype).tiny)
    factor = torch.cat([lm_weight, kd_weight, floor]).max()
    return factor, (lm_weight / factor, kd_weight / factor)


def merge_repeats(indices: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Give each token of a row one entry with the sum of its weights; the others become -1.

    Sums are differences of running sums in float64, in an order that does not vary.
    """
    token, order = indices.sort(dim=-1, stable=True)
    known = token >= 0
    weight = torch.where(known, log_weights.exp().double().gather(1, order), 0.0)
    running = weight.cumsum(-1)
    last = torch.ones_like(known)
    last[:, :-1] = token[:, 1:] != token[:, :-1]
    last &= known
    # the running sum up to the entry of the token before
    before = torch.where(last, running, 0.0).cummax(-1).values.roll(1, -1)
    before[:, :1] = 0
    total = (running - before).log().to(log_weights.dtype)
    return torch.where(last, token, -1), torch.where(last, total, float("-inf"))


def check_ids(name: str, ids: Tensor, limit: int, nothing: int, remedy: str) -> None:
    """Refuse ids outside ``[0, limit)`` that are not ``nothing``; waits for the device once."""
    if not ids.numel():
        return
    low, high = torch.stack(torch.aminmax(torch.where(ids == nothing, 0, ids))).tolist()
    if low < 0 or high >= limit:
        expected = f"ids in [0, {limit}), or {nothing}"
        raise ValueError(message(name, expected, low if low < 0 else high, remedy))


def check_distinct(name: str, ids: Tensor) -> None:
    """Refuse rows that list an id twice; -1 may repeat. Waits for the device once."""
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        row = int(twice.any(-1).nonzero()[0])
        remedy = "add their probabilities up, or pass draws with weights"
        raise ValueError(message(name, f"tokens that differ in row {row}", ids[row], remedy))
