"""Supervised fine-tuning with the trainer of trl: its data preparation, its loss, no gradients."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from trl import SFTTrainer

from zo2.engine import ZOEngine
from zo2.trainer import ZOTrainerMixin

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ZOSFTTrainer"]


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` whose steps are zeroth-order; see :class:`zo2.ZOTrainerMixin`."""

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        """As ``trl.SFTTrainer``, with the options of :class:`zo2.ZOTrainerMixin`.

        Raises:
            TypeError: A prepared engine was given, whose model trl can no longer change.
        """
        if isinstance(model, ZOEngine):
            raise TypeError("SFTTrainer changes its model before training: pass the model itself")
        super().__init__(model, args, *rest, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As the mixin's; trl's metrics are counted once a batch, not once a probe."""
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            measured = self._metrics["train" if self.engine.zo.train_mode else "eval"]
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens
        for name, values in measured.items():
            if name != "num_tokens":
                metrics["train"][name].append(sum(values) / len(values))
        counted = inputs["attention_mask"].sum() if "attention_mask" in inputs else None
        self._total_train_tokens += int(inputs["input_ids"].numel() if counted is None else counted)
        metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss
