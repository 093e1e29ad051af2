"""The head of a causal language model, taken apart so that logits need not be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shared_kernels.ops.lm_head import LinearLogprob, linear_entropy, linear_logprob

if TYPE_CHECKING:
    from torch import Tensor

#: Logits that a head which must be called makes at a time.
_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Head:
    """``softcap(scale (W h + b))``.

    Attributes:
        module: The output embeddings.
        scale: Cohere's ``logit_scale``, or one over Granite's ``logits_scaling``.
        softcap: Gemma's ``final_logit_softcapping``.
    """

    module: Any
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Read it off a transformers model."""
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(
            model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None)
        )

    def is_plain(self) -> bool:
        """Return whether the module's weight is all there is to it.

        Adapters, quantised weights, weights that are loaded when called, and sharded ones are not.
        """
        module = self.module
        return (
            type(module) is nn.Linear
            and type(module.weight) is nn.Parameter
            and module.weight.is_floating_point()
            and module.weight.device.type != "meta"
            and not hasattr(module, "_hf_hook")
            and not module._forward_hooks
            and not module._forward_pre_hooks
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits ``(R, V)``, to compare with the model's."""
        z = self.module(hidden) * self.scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()

    def logprobs(self, hidden: Tensor, targets: Tensor, rows: Tensor) -> LinearLogprob:
        """Return what `linear_logprob` does for hidden states ``(U, d)``."""
        parts = self._parts()
        return linear_logprob(hidden, parts.pop("weight"), targets, rows=rows, **parts)

    def entropy(self, hidden: Tensor) -> Tensor:
        """Return the entropy of the next token, nats, float32 ``(U,)``, for states ``(U, d)``.

        A head that is not plain is called, some rows at a time.
        """
        hidden = hidden.detach()
        if self.is_plain() and hidden.dtype == self.module.weight.dtype:
            parts = self._parts()
            weight = parts.pop("weight")
            found = linear_entropy(hidden.to(weight.device), weight, **parts).entropy
            return found.to(hidden.device)
        pieces = []
        with torch.no_grad():
            step = max(1, _ELEMENTS // max(1, self._vocabulary()))
            for low in range(0, len(hidden), step):
                logprobs = self.logits(hidden[low : low + step]).float().log_softmax(-1)
                p = logprobs.exp()
                pieces.append(-torch.where(p == 0, 0.0, p * logprobs).sum(-1).to(hidden.device))
        return torch.cat(pieces) if pieces else hidden.new_empty(0, dtype=torch.float32)

    def _vocabulary(self) -> int:
        return int(getattr(self.module, "out_features", 1 << 18))

    def _parts(self) -> dict[str, Any]:
        module = self.module
        return {
            "weight": module.weight.detach(),
            "bias": None if module.bias is None else module.bias.detach(),
            "scale": self.scale,
            "softcap": self.softcap,
        }
