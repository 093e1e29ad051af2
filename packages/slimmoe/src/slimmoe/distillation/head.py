"""Run a model with something else in the place of its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from slimmoe.mtp.modeling_mtp import MTPHead


def in_place_of_head(
    model: Any,
    head: Any,
    modules: MTPHead | None,
    inputs: Mapping[str, Any],
    function: Callable[[list[Tensor]], Tensor],
) -> tuple[Any, Tensor]:
    """Run a model, with a function in the place of its head.

    There the weights of the head are whole, also where processes have a part of them each; and what
    the function gives leaves the model in the place of logits, so that whatever wraps it knows that
    there will be gradients.

    Args:
        model: As processes wrap it.
        head: Its own.
        modules: Of MTP, which are run behind it.
        inputs: Of a batch.
        function: Of last hidden states of the model and of modules, ``(B, T - k, D)``; gives a
            number.

    Returns:
        What the model says, with the logits of the last token, and the number.
    """
    forward, kept = head.forward, []

    def instead(hidden: Tensor) -> Tensor:
        states = [hidden]
        if modules is not None:
            mask = inputs.get("attention_mask")
            states += modules(hidden, inputs["input_ids"], mask, inputs.get("position_ids"))
        found = function(states)
        with torch.no_grad():
            kept.extend([found.detach(), forward(hidden[:, -1:])])
        return found

    head.forward = instead
    try:
        outputs = model(**inputs, use_cache=False)
    finally:
        del head.forward
    exact, last = kept
    loss, outputs.logits = outputs.logits, last
    if loss.dtype != exact.dtype:
        # a wrapper has rounded it
        loss = exact + (loss - loss.detach()).to(exact)
    return outputs, loss
