"""GPT-NeoX and its kin: Pythia."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.adapters.base import Adapter, modules_as

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

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream."""
        return self.model.gpt_neox.embed_in(ids).to(self.dtype)

    def attention_norm(self, layer: int, x: Tensor) -> Tensor:
        """Normalise what heads read."""
        return modules_as(self.dtype, self.blocks[layer].input_layernorm, x)

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

    def rotate(self, layer: int, x: Tensor) -> Tensor:
        """Turn the first dimensions of each head."""
        return self.turned(self.model.gpt_neox.rotary_emb, x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Return what an MLP writes."""
        block = self.blocks[layer]
        normed = modules_as(self.dtype, block.post_attention_layernorm, x)
        return modules_as(self.dtype, block.mlp, normed)

    def final_norm(self, x: Tensor) -> Tensor:
        """Normalise what logits are made of."""
        return modules_as(self.dtype, self.model.gpt_neox.final_layer_norm, x)
