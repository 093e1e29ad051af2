"""Gemma-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional

from pahq.adapters.base import Norm
from pahq.adapters.post_norm import PostNormAdapter

if TYPE_CHECKING:
    from torch import Tensor


class Gemma2Adapter(PostNormAdapter):
    """Norms before and behind, caps of scores and logits, windows in some layers."""

    _act = "hidden_activation"

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream: embeddings times the root of the width."""
        module = self.model.get_input_embeddings()
        weight = module.weight.detach()
        # the model rounds the factor as it rounds its weights
        scale = module.embed_scale.to(weight.dtype).to(self.dtype)
        return functional.embedding(ids, weight).to(self.dtype) * scale

    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return a norm before a block, or the last."""
        block = self.blocks[layer]
        before = {"attention": block.input_layernorm, "mlp": block.pre_feedforward_layernorm}
        return self.rms(before.get(place, self.model.model.norm))

    def rms(self, module: Any) -> Norm:
        """Return a norm, whose weight is held as what it has more than 1."""
        return Norm("rms", 1 + module.weight.detach().to(self.dtype), None, module.eps)

    def softcap(self, layer: int) -> float | None:
        """Return the cap of scores."""
        return self.blocks[layer].self_attn.attn_logit_softcapping
