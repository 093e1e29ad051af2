"""Llama and its kin: Mistral, Qwen2, Qwen3, SmolLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.adapters.base import Adapter, FeedForward, Norm, activation, modules_as

if TYPE_CHECKING:
    from torch import Tensor


class LlamaAdapter(Adapter):
    """RMS norms, rotary positions, grouped keys, gated MLPs; biases and head norms if there are."""

    #: Where a configuration has the activation.
    _act = "hidden_act"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        self.layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.blocks = model.model.layers
        self.act = activation(getattr(config, self._act))

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream."""
        return self.model.get_input_embeddings()(ids).to(self.dtype)

    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return a norm."""
        block = self.blocks[layer]
        behind = block.post_attention_layernorm
        module = {"attention": block.input_layernorm, "mlp": behind}.get(place)
        return self.rms(self.model.model.norm if module is None else module)

    def rms(self, module: Any) -> Norm:
        """Return what an RMS norm of transformers is."""
        return Norm("rms", module.weight.detach(), None, module.variance_epsilon)

    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a projection, by heads."""
        linear = getattr(self.blocks[layer].self_attn, f"{part}_proj")
        count = self.heads if part == "q" else self.key_heads
        bias = None if linear.bias is None else linear.bias.detach().view(count, -1)
        return linear.weight.detach().view(count, -1, linear.in_features), bias

    def output(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return what heads write with."""
        linear = self.blocks[layer].self_attn.o_proj
        bias = None if linear.bias is None else linear.bias.detach()
        weight = linear.weight.detach().view(linear.out_features, self.heads, -1)
        return weight.transpose(0, 1), bias

    def head_norm(self, layer: int, part: str, x: Tensor) -> Tensor:
        """Normalise queries or keys, in Qwen3."""
        norm = getattr(self.blocks[layer].self_attn, f"{part}_norm", None)
        return x if norm is None else modules_as(self.dtype, norm, x)

    def scale(self, layer: int) -> float:
        """Return what scores are multiplied by."""
        return float(self.blocks[layer].self_attn.scaling)

    def window(self, layer: int) -> int | None:
        """Return how many keys a query sees."""
        attention = self.blocks[layer].self_attn
        return getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )

    def rotate(self, layer: int, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Turn pairs of halves."""
        return self.turned(self.model.model.rotary_emb, x, at)

    def feed_forward(self, layer: int) -> FeedForward:
        """Return what an MLP is made of."""
        mlp = self.blocks[layer].mlp
        inner, gate, outer = (
            (linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
            for linear in (mlp.up_proj, mlp.gate_proj, mlp.down_proj)
        )
        return FeedForward(self.act, *inner, *outer, *gate)
