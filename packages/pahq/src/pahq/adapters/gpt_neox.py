"""GPT-NeoX and its kin: Pythia."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.adapters.base import Adapter, FeedForward, Norm, activation, layer_norm

if TYPE_CHECKING:
    from torch import Tensor


class GPTNeoXAdapter(Adapter):
    """Layer norms, rotary positions of a part of each head, MLPs beside the heads or after them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers = model.config.num_hidden_layers
        self.heads = self.key_heads = model.config.num_attention_heads
        self.parallel = bool(model.config.use_parallel_residual)
        self.blocks = model.gpt_neox.layers
        self.act = activation(model.config.hidden_act)

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream."""
        return self.model.gpt_neox.embed_in(ids).to(self.dtype)

    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return a norm."""
        block = self.blocks[layer]
        behind = block.post_attention_layernorm
        module = {"attention": block.input_layernorm, "mlp": behind}.get(place)
        return layer_norm(self.model.gpt_neox.final_layer_norm if module is None else module)

    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a projection, by heads."""
        joint = self.blocks[layer].attention.query_key_value
        # each head has its query, key and value together
        weight = joint.weight.detach().view(self.heads, 3, -1, joint.in_features)
        place = "qkv".index(part)
        if joint.bias is None:
            return weight[:, place], None
        return weight[:, place], joint.bias.detach().view(self.heads, 3, -1)[:, place]

    def output(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return what heads write with."""
        linear = self.blocks[layer].attention.dense
        bias = None if linear.bias is None else linear.bias.detach()
        weight = linear.weight.detach().view(linear.out_features, self.heads, -1)
        return weight.transpose(0, 1), bias

    def scale(self, layer: int) -> float:
        """Return what scores are multiplied by."""
        return float(self.blocks[layer].attention.scaling)

    def rotate(self, layer: int, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Turn the first dimensions of each head."""
        return self.turned(self.model.gpt_neox.rotary_emb, x, at)

    def feed_forward(self, layer: int) -> FeedForward:
        """Return what an MLP is made of."""
        mlp = self.blocks[layer].mlp
        inner, outer = mlp.dense_h_to_4h, mlp.dense_4h_to_h
        return FeedForward(
            self.act, inner.weight.detach(), inner.bias.detach(),
            outer.weight.detach(), outer.bias.detach(),
        )  # fmt: skip
