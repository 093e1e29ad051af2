"""Programs that tracr compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.adapters.base import NO_NORM, Adapter, FeedForward

if TYPE_CHECKING:
    from torch import Tensor

    from pahq.adapters.base import Norm


class TracrAdapter(Adapter):
    """No norms, learned positions, queries that see all keys, plain MLPs, biases everywhere."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        self.layers, self.heads, self.causal = config.layers, config.heads, config.causal
        self.key_heads, self.blocks = self.heads, model.blocks

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream."""
        return self.model.embed(ids).to(self.dtype)

    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return what changes nothing."""
        return NO_NORM

    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a projection, by heads."""
        linear = self.model.blocks[layer].parts[part]
        weight, bias = linear.weight.detach(), linear.bias.detach()
        return weight.view(self.heads, -1, weight.shape[1]), bias.view(self.heads, -1)

    def output(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return what heads write with."""
        linear = self.model.blocks[layer].output
        weight = linear.weight.detach()
        return weight.view(len(weight), self.heads, -1).transpose(0, 1), linear.bias.detach()

    def feed_forward(self, layer: int) -> FeedForward:
        """Return what an MLP is made of."""
        inner, outer = self.model.blocks[layer].inner, self.model.blocks[layer].outer
        return FeedForward(
            "relu", inner.weight.detach(), inner.bias.detach(),
            outer.weight.detach(), outer.bias.detach(),
        )  # fmt: skip
