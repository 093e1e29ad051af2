"""The head of a causal language model, taken apart so that logits need not be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared_kernels.ops.lm_head import LinearLogprob, linear_logprob

if TYPE_CHECKING:
    from torch import Tensor


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

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits ``(R, V)``, to compare with the model's."""
        z = self.module(hidden) * self.scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()

    def logprobs(self, hidden: Tensor, targets: Tensor, rows: Tensor) -> LinearLogprob:
        """Return what `linear_logprob` does for hidden states ``(U, d)``."""
        return linear_logprob(
            hidden,
            self.module.weight.detach(),
            targets,
            rows=rows,
            bias=None if self.module.bias is None else self.module.bias.detach(),
            scale=self.scale,
            softcap=self.softcap,
        )
