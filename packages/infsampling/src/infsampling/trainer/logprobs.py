"""Log-probabilities of packed completions, with gradients and without their logits being kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from shared_kernels.models import Head
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infsampling.attention import TrainingCall

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Logits that exist at a time: 256 MB in float32. Backward holds three times as much.
_LOGITS: Final = 1 << 26


def _part(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    law = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    entropy = -(law.detach().exp() * law.detach()).sum(-1)
    return law.gather(-1, targets[:, None])[:, 0], entropy


def packed_logprobs(
    model: Any, inner: Any, batch: Mapping[str, Any], temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of a micro batch's completion tokens, and entropies before them.

    The model runs once over the prompts and all completions; its head runs on the tokens that
    predict one, some hundreds at a time, and again in backward, so that no logits are kept.

    Args:
        model: To be called, a wrapper of ``inner`` perhaps.
        inner: The model of transformers itself, attending by our function.
        batch: Of `micro_batches`, on the model's device.
        temperature: Logits are divided by it.

    Returns:
        float ``(B, L)`` each, padded with 0; entropies are no part of the graph.
    """
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        kept.append(args[0])
        # the logits of one token, which nobody reads
        return (args[0][:, :1],)

    head = Head.of(inner)
    hook = head.module.register_forward_pre_hook(keep)
    try:
        model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False,
            logits_to_keep=batch["predecessors"], infsampling=TrainingCall(batch["layout"]),
        )  # fmt: skip
    finally:
        hook.remove()
    hidden = kept[0][0]
    size = max(1, _LOGITS // head.module.weight.shape[0])
    parts = [
        checkpoint(_part, head, h, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(size), batch["targets"].split(size), strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    logps, entropies = (
        pad(torch.cat(x).split(batch["lengths"]), batch_first=True)
        for x in zip(*parts, strict=True)
    )
    return logps, entropies
