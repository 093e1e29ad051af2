"""Activations and weights rounded as published, to measure what that does to a circuit.

PAHQ (arXiv:2510.23264) runs attention in float8, MLPs in bfloat16, and the head of the edge in
question in float32. Its baseline RTN-Q has no such head. Norms, softmax and the residual stream
are in float32 in both. What a search loses by it is in the README; `pahq.precision` rounds
differences instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pahq.forward import Executor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pahq.adapters import Adapter
    from pahq.graph import Graph

#: Whether the head in question is in high precision, by the name of a rounding.
ROUNDED = {"fp8-rtn": True, "rtn-q": False}
_MOST = torch.finfo(torch.float8_e4m3fn).max


class RoundedExecutor(Executor):
    """Runs whose products have rounded operands: to the nearest number, without scales.

    Inputs and weights of queries, keys, values and output projections are float8 (E4M3, at most
    448), MLPs are bfloat16 throughout. Sums are float32, so that this measures rounding alone, and
    spares no time.

    Args:
        adapter: Of the model.
        graph: Of it.
        kind: One of `ROUNDED`.

    Attributes:
        precise: Layer and query heads that are not rounded, and with them the keys and values that
            they see; None for no such heads.
    """

    precise: tuple[int, list[int]] | None = None

    def __init__(self, adapter: Adapter, graph: Graph, kind: str) -> None:
        super().__init__(adapter, graph)
        self.kind = kind

    def focus(self, receiver: int) -> None:
        """Let the heads of a receiver be in high precision, where the rounding has such heads."""
        layer, part, _ = self.graph.place(receiver)
        heads = [sender - self.graph.head(layer, 0) for sender in self.graph.readers(receiver)]
        asked = ROUNDED[self.kind] and part in "qkv"
        self.precise = (layer, heads) if asked else None

    def part(self, layer: int, part: str, heads: Sequence[int], x: Tensor) -> Tensor:
        """Return queries, keys or values of some of the model's heads."""
        here = self._precise(layer, part, heads)
        return self.adapter.part(layer, part, heads, x, lambda y: _but(here, y))

    def write(self, layer: int, heads: Sequence[int], z: Tensor) -> Tensor:
        """Return what some heads write."""
        here = self._precise(layer, "q", heads)
        return self.adapter.write(layer, heads, z, lambda y: _but(here, y))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Return what an MLP writes."""
        return self.adapter.mlp(layer, x, torch.bfloat16)

    def _precise(self, layer: int, part: str, heads: Sequence[int]) -> list[int]:
        """Return the places of precise heads among some."""
        if self.precise is None or self.precise[0] != layer:
            return []
        group = 1 if part == "q" else self.adapter.heads // self.adapter.key_heads
        wanted = {head // group for head in self.precise[1]}
        return [place for place, head in enumerate(heads) if head in wanted]


def _but(places: list[int], x: Tensor) -> Tensor:
    """Return ``(n, ...)`` rounded, but for some."""
    found = x.clamp(-_MOST, _MOST).to(torch.float8_e4m3fn).to(x.dtype)
    found[places] = x[places]
    return found
