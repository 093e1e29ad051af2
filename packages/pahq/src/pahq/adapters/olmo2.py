"""OLMo-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import message

from pahq.adapters.base import NO_NORM
from pahq.adapters.post_norm import PostNormAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pahq.adapters.base import Norm


class Olmo2Adapter(PostNormAdapter):
    """Norms behind attention and MLP alone, and over the queries and keys of all heads.

    Each head makes its raw query q_j from its own input. It is divided by the root mean square over
    the raw queries of all heads of the same run, one number per token, and likewise its key; it is
    ``w_j q_j / rms(q_1 ... q_H)``. If every query head has a receiver of keys of its own, copies of
    a key count one by one, as often as each other: where they are equal, the model is what it was.
    """

    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return the last norm; blocks have none before them."""
        return NO_NORM if place in ("attention", "mlp") else self.rms(self.model.model.norm)

    def part(
        self,
        layer: int,
        part: str,
        heads: Sequence[int],
        x: Tensor,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return queries, keys or values ``(n, ..., T, d)``, each from its input.

        Args:
            layer: Of the heads.
            part: ``q``, ``k`` or ``v``.
            heads: For queries and keys all that the model has, each as often as the others.
            x: ``(n, ..., T, D)``, what each reads from the residual stream, all in one run.
            rounded: Rounds both operands of the product.

        Raises:
            ValueError: Queries or keys of some heads only: their norm is over those of all.
        """
        if part == "v":
            return super().part(layer, part, heads, x, rounded)
        count = self.heads if part == "q" else self.key_heads
        if sorted(heads) != sorted([*range(count)] * max(1, len(heads) // count)):
            remedy = f"the norm of {part} is over all heads of a layer"
            raise ValueError(
                message("heads", f"all {count} heads, as often as each other", [*heads], remedy)
            )
        found = self.project(layer, part, heads, x, rounded)
        norm = self.rms(getattr(self.blocks[layer].self_attn, f"{part}_norm"))
        weight = norm.weight.view(count, -1).to(found.dtype)
        weight = weight[torch.as_tensor([*heads], device=weight.device)]
        weight = weight.view(len(weight), *[1] * (found.ndim - 2), -1)
        square = found.square().mean((0, -1), keepdim=True)
        return self.rotate(layer, found * (square + norm.eps).rsqrt() * weight)

    def head_norm(self, layer: int, part: str, x: Tensor) -> Tensor:
        """Refuse: no head has a norm of its own.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"head_norm: the norm of {part} is over all heads of a layer; call part with all"
        )
