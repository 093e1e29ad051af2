"""Supervised fine-tuning with the trainer of trl: its data preparation, a private step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from flashdp.trainer import DPTrainerMixin

__all__ = ["DPSFTTrainer"]


class _OwnLoss(SFTTrainer):
    """Trains on the model's own loss and logits.

    trl's loss is a mean over the batch's tokens, taken by a fused head that passes the private
    layer by, and with it come entropy and accuracy, which are no private numbers.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        """As the stock trainer's while training; otherwise as trl's."""
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class DPSFTTrainer(DPTrainerMixin, _OwnLoss):
    """``trl.SFTTrainer`` with differential privacy; see :class:`flashdp.DPTrainerMixin`.

    A privacy unit is a row of the data set as it is given, or a user (``unit_ids``).
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        """As ``trl.SFTTrainer``, with the options of :class:`flashdp.DPTrainerMixin`.

        Raises:
            ValueError: Rows would be packed together, or the loss is not the likelihood.
        """
        for name, allowed, why in (
            ("packing", False, "a packed row holds parts of several units"),
            ("padding_free", False, "rows are told apart by the batch's first dimension"),
            ("loss_type", "nll", "other losses are means over the batch, which couple its units"),
        ):
            given = getattr(args, name, allowed)
            if given != allowed:
                raise ValueError(
                    f"private training: SFTConfig.{name}={given!r}, and {why}: set it to "
                    f"{allowed!r}"
                )
        super().__init__(model, args, *rest, **kwargs)
