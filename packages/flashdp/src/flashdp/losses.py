"""Losses that are sums over units: no unit's term depends on another unit's data."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from flashdp.errors import PrivacyError
from flashdp.units import packed_starts

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

__all__ = ["LossReplacement", "loss_owner", "per_sample_loss", "unit_loss"]


def per_sample_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row, averaged (or summed) over that row's own labels.

    A batch's token mean divides by the number of tokens of *all* rows, so one row's length changes
    every other row's gradient, and clipping no longer bounds what a row can do. This does not.

    Args:
        logits: (rows, ..., classes).
        labels: (rows, ...) int64.
        reduction: Over a row's labels.
        ignore_index: Labels that do not count; a row without any has loss 0.
        cu_seqlens: Of sequences packed into one row: integers (sequences + 1,), tokens before
            each. Each is then what a row is otherwise.

    Returns:
        float32 (rows,) or (sequences,); ``per_sample_loss(...).sum().backward()`` is what a private
        step wants.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected labels of shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    losses = functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    counted = labels.flatten() != ignore_index
    if cu_seqlens is None:
        total, counts = losses.view(len(labels), -1).sum(1), counted.view(len(labels), -1).sum(1)
    else:
        lengths = cu_seqlens.diff().to(losses.device)
        owner = torch.repeat_interleave(lengths, output_size=len(losses))
        total = losses.new_zeros(len(lengths)).index_add(0, owner, losses)
        counts = torch.zeros_like(lengths).index_add(0, owner, counted.to(lengths.dtype))
    return total if reduction == "sum" else total / counts.clamp(min=1)


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
    the whole batch, is not used. With ``cu_seq_lens_q`` among the keywords it is a sum over packed
    sequences, and none predicts the next one's first token.
    """
    starts = packed_starts(kwargs)
    if shift_labels is None:
        if starts is not None:
            inner = starts[1:-1].to(labels.device).long()
            labels = labels.index_fill(-1, inner, ignore_index)
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(logits.device)
    return per_sample_loss(logits, shift_labels, ignore_index=ignore_index, cu_seqlens=starts).sum()


def loss_owner(model: Any) -> Any:
    """Return the model whose ``loss_function`` a forward calls: inside DDP and PEFT."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refused_loss(*args: Any, **kwargs: Any) -> Tensor:
    raise PrivacyError(
        "this model's own loss averages over the tokens of the whole batch, so that one unit's "
        "length changes the others' gradients: call the model without labels, and use "
        "flashdp.per_sample_loss(logits, labels).sum()"
    )


# transformers takes a model whose class it has no loss for to be a causal one.
_PER_UNIT = (None, "ForCausalLM")
# Means over rows, which loss_reduction="mean" undoes.
_PER_ROW = ("ForSequenceClassification", "ForImageClassification")


class LossReplacement:
    """A transformers model with a loss that is a sum over units, until :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        """Replace the loss of a causal model; one over all tokens of a batch is made to refuse."""
        self._owner = loss_owner(model)
        kind = getattr(self._owner, "loss_type", None)
        self._replaced = hasattr(self._owner, "loss_function") and kind not in _PER_ROW
        self._before = vars(self._owner).get("_loss_function")
        if self._replaced:
            self._owner.loss_function = unit_loss if kind in _PER_UNIT else _refused_loss

    @contextmanager
    def paused(self) -> Generator[None]:
        """Let the model have its own loss inside a ``with`` block, as for an evaluation."""
        current = vars(self._owner).get("_loss_function")
        if current not in (unit_loss, _refused_loss):
            yield
            return
        self.remove()
        try:
            yield
        finally:
            self._owner.loss_function = current

    def remove(self) -> None:
        """Give the model its own loss back."""
        if self._replaced:
            vars(self._owner).pop("_loss_function", None)
            if self._before is not None:
                self._owner.loss_function = self._before
