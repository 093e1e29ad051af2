"""GPT-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pahq.adapters.base import Adapter, modules_as

if TYPE_CHECKING:
    from torch import Tensor


class GPT2Adapter(Adapter):
    """Layer norms with biases, learned positions, joint projections, plain MLPs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers, self.heads = model.config.n_layer, model.config.n_head
        self.key_heads = self.heads
        self.blocks = model.transformer.h

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream."""
        body = self.model.transformer
        index = torch.arange(ids.shape[1], device=ids.device)
        return (body.wte(ids) + body.wpe(index)).to(self.dtype)

    def attention_norm(self, layer: int, x: Tensor) -> Tensor:
        """Normalise what heads read."""
        return modules_as(self.dtype, self.blocks[layer].ln_1, x)

    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a projection, by heads."""
        joint = self.blocks[layer].attn.c_attn
        place = "qkv".index(part)
        # Conv1D: (in, out)
        width = joint.weight.shape[0]
        weight = joint.weight.detach()[:, place * width : (place + 1) * width]
        bias = joint.bias.detach()[place * width : (place + 1) * width]
        return weight.T.reshape(self.heads, -1, width), bias.view(self.heads, -1)

    def output(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return what heads write with."""
        linear = self.blocks[layer].attn.c_proj
        width = linear.weight.shape[1]
        weight = linear.weight.detach().view(self.heads, -1, width)
        return weight.transpose(1, 2), linear.bias.detach()

    def scale(self, layer: int) -> float:
        """Return what scores are multiplied by."""
        attention, found = self.blocks[layer].attn, 1.0
        if attention.scale_attn_weights:
            found = float(attention.head_dim) ** -0.5
        if attention.scale_attn_by_inverse_layer_idx:
            found /= layer + 1
        return found

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Return what an MLP writes."""
        block = self.blocks[layer]
        return modules_as(self.dtype, block.mlp, modules_as(self.dtype, block.ln_2, x))

    def final_norm(self, x: Tensor) -> Tensor:
        """Normalise what logits are made of."""
        return modules_as(self.dtype, self.model.transformer.ln_f, x)
