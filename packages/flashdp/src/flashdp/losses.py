"""Losses that are sums over units: no unit's term depends on another unit's data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["loss_owner", "per_sample_loss", "unit_loss"]


def per_sample_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of each row, averaged (or summed) over that row's own labels.

    A batch's token mean divides by the number of tokens of *all* rows, so one row's length changes
    every other row's gradient, and clipping no longer bounds what a row can do. This does not.

    Args:
        logits: (rows, ..., classes).
        labels: (rows, ...) int64.
        reduction: Over a row's labels.
        ignore_index: Labels that do not count; a row without any has loss 0.

    Returns:
        float32 (rows,); ``per_sample_loss(...).sum().backward()`` is what a private step wants.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected labels of shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    losses = functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=ignore_index, reduction="none"
    ).view(len(labels), -1)
    total = losses.sum(1)
    if reduction == "sum":
        return total
    counts = (labels.view(len(labels), -1) != ignore_index).sum(1)
    return total / counts.clamp(min=1)


def unit_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Sum over rows of each row's mean next-token loss, in place of transformers' batch mean.

    The signature is that of transformers' ``ForCausalLMLoss``; ``num_items_in_batch``, a count over
    the whole batch, is not used.
    """
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.device)
    return per_sample_loss(logits, shift_labels, ignore_index=ignore_index).sum()


def loss_owner(model: Any) -> Any:
    """Return the model whose ``loss_function`` a forward calls: inside PEFT's wrapper, if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
