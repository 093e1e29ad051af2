"""What a step measures: a batch turned into losses, in one piece or in weighted micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

__all__ = ["Objective", "Weighted", "as_objectives", "counted", "split_batch", "to_device"]

Objective = Callable[[nn.Module], "float | torch.Tensor"]
Weighted = tuple[Objective, float]


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors inside a batch; pinned host tensors are copied asynchronously."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    return value


def _loss(batch: Mapping[str, Any]) -> Objective:
    def objective(model: nn.Module) -> torch.Tensor:
        out = model(**(_without_cache(model) | dict(batch)))
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if loss is None:
            raise ValueError(
                f"the model returned no loss for a batch with the keys {sorted(batch)}; add "
                "'labels', or pass a function of the model that returns a number"
            )
        return loss

    return objective


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """A loss needs no KV cache, and every probe would build one."""
    get_base: Any = getattr(model, "get_base_model", lambda: model)
    base = get_base()
    return {"use_cache": False} if "use_cache" in signature(base.forward).parameters else {}


def counted(batch: Mapping[str, Any], *, shifted: bool = True) -> torch.Tensor | int:
    """Count what the mean loss of a batch averages over: label tokens, or rows.

    Args:
        batch: Keyword arguments for the model.
        shifted: Whether the loss leaves out the first label of a sequence, which a decoder-only
            model has nothing to predict from.

    Returns:
        The count, a tensor without dimensions where it takes the labels' values.
    """
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.ndim > 1:
        return ((labels[:, 1:] if shifted else labels) != -100).sum()
    return next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 1)


def split_batch(batch: Mapping[str, Any], micro_batch_size: int | None) -> list[Mapping[str, Any]]:
    """Cut a batch into parts of at most ``micro_batch_size`` rows.

    Raises:
        ValueError: The batch's tensors differ in their first dimension.
    """
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim}
    sizes = {k: len(v) for k, v in tensors.items()}
    total = next(iter(sizes.values()), 0)
    if micro_batch_size is None or total <= micro_batch_size:
        return [batch]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"cannot split a batch whose tensors have different first dimensions: {sizes}; "
            "leave micro_batch_size unset"
        )
    return [
        {k: v[start : start + micro_batch_size] if k in tensors else v for k, v in batch.items()}
        for start in range(0, total, micro_batch_size)
    ]


def as_objectives(
    what: Objective | Mapping[str, Any] | Sequence[Weighted],
    device: torch.device,
    micro_batch_size: int | None,
    *,
    shifted: bool = True,
) -> list[Weighted]:
    """Turn what a step is to measure into weighted objectives.

    Args:
        what: A mapping of keyword arguments for the model, with labels; a function that takes
            the model and returns a number; or pairs of such a function and its weight.
        device: Where the batch's tensors go.
        micro_batch_size: Rows per objective of a batch; all parts share each load of a block. A
            part weighs as much as its loss averages over, so that the weighted sum of losses is
            the loss of the whole batch, up to rounding.
        shifted: See :func:`counted`.

    Raises:
        TypeError: ``what`` is none of these.
        ValueError: A function is given together with ``micro_batch_size``, or the batch cannot be
            split.
    """
    if isinstance(what, Mapping):
        parts = split_batch(what, micro_batch_size)
        losses = [_loss(to_device(part, device)) for part in parts]
        if len(parts) == 1:
            return [(losses[0], 1.0)]
        counts = [float(counted(part, shifted=shifted)) for part in parts]
        if not sum(counts):
            raise ValueError("no label of the batch counts (all are -100)")
        # The mean loss of a part without labels is not a number.
        return [(f, n / sum(counts)) for f, n in zip(losses, counts, strict=True) if n]
    if callable(what):
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} splits batches, a function cannot be split: "
                "leave it unset, or give pairs of functions and weights"
            )
        return [(cast("Objective", what), 1.0)]
    if not isinstance(what, Sequence) or not what or not all(map(_is_weighted, what)):
        raise TypeError(
            "expected a batch (a mapping), a function of the model, or pairs of functions and "
            f"weights, got {type(what).__name__}"
        )
    return list(cast("Sequence[Weighted]", what))


def _is_weighted(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and callable(pair[0])
