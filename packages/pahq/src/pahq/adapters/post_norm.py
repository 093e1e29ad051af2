"""Decoders with norms behind attention and MLP: what a head writes, when a norm follows the sum.

Attention writes ``w S / rms(S)``, with S the sum over heads of ``z_j W_O^(j)``, and no head alone
has a norm. The sender a{l}.h{j} is the head's share of it,

    w (z_j W_O^(j)) / rms(S),    rms(S)^2 = mean(S^2) + eps,

with S of the same run: shares add up to what attention writes, exactly, in patched runs too, as all
edges give the model and no edge the corrupted run. All heads of a layer have one number per token
in common, which each of them changes: a head with the inputs that it has on the corrupted prompt
writes something else once another head of its layer differs. The sender m{l} is the MLP's output
behind its norm.

EAP-IG (hannamw/EAP-IG, `evaluate_graph`) defines it otherwise: its edges carry ``z_j W_O^(j)``, and
each receiver normalises the sum that it reads of a layer's heads. Circuits that lack edges have
other logits there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

from pahq.adapters.llama import LlamaAdapter
from pahq.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from pahq.adapters.base import Norm


class PostNormAdapter(LlamaAdapter):
    """As Llama, with RMS norms behind attention and MLP.

    Raises:
        UnsupportedModelError: What heads write has a bias: behind the norm it would change from run
            to run and belong to no head.
    """

    shared_scale = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if any(self.output(layer)[1] is not None for layer in range(self.layers)):
            raise UnsupportedModelError(
                f"model: the output projection of attention in {type(model).__name__} has a bias; "
                "behind the norm of the heads' sum it belongs to no head, use a model with "
                "attention_bias=False"
            )

    def behind(self, place: str, layer: int) -> Norm:
        """Return the norm behind ``attention`` or ``mlp`` of a layer."""
        block = self.blocks[layer]
        attention, mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
        return self.rms({"attention": attention, "mlp": mlp}[place])

    def mlp(self, layer: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return what an MLP writes, behind its norm."""
        return self.behind("mlp", layer)(super().mlp(layer, x, dtype))

    def write(
        self,
        layer: int,
        heads: Sequence[int],
        z: Tensor,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return each head's share of what attention writes, ``(H, ..., T, D)``.

        Args:
            layer: Of the heads.
            heads: All of the layer, in any order.
            z: ``(H, ..., T, d)``, what they read, all in one run.
            rounded: Rounds both operands of the product.

        Raises:
            ValueError: Not all heads: a share depends on the sum of all.
        """
        if sorted(heads) != list(range(self.heads)):
            remedy = "what a head writes depends on the norm of the sum of all heads"
            raise ValueError(
                message("heads", f"all {self.heads} heads of a layer", [*heads], remedy)
            )
        made, norm = super().write(layer, heads, z, rounded), self.behind("attention", layer)
        square = made.sum(0).square().mean(-1, keepdim=True)
        return made * (square + norm.eps).rsqrt() * norm.weight.to(made.dtype)
