"""GPT-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pahq.adapters.base import Adapter, FeedForward, Norm, activation, layer_norm

if TYPE_CHECKING:
    from torch import Tensor


class GPT2Adapter(Adapter):
    """Layer norms with biases, learned positions, joint projections, plain MLPs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers, self.heads = model.config.n_layer, model.config.n_head
        self.key_heads = self.heads
        self.blocks = model.transformer.h
        self.act = activation(model.config.activation_function)

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream."""
        body = self.model.transformer
        index = torch.arange(ids.shape[1], device=ids.device)
        return (body.wte(ids) + body.wpe(index)).to(self.dtype)

    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return a norm."""
        block = self.blocks[layer]
        module = {"attention": block.ln_1, "mlp": block.ln_2}.get(place)
        return layer_norm(self.model.transformer.ln_f if module is None else module)

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

    def feed_forward(self, layer: int) -> FeedForward:
        """Return what an MLP is made of."""
        mlp = self.blocks[layer].mlp
        inner, outer = mlp.c_fc, mlp.c_proj
        return FeedForward(
            self.act, inner.weight.detach().T, inner.bias.detach(),
            outer.weight.detach().T, outer.bias.detach(),
        )  # fmt: skip
