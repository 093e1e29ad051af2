"""Runs of a model in which some edges carry what they carry on corrupted inputs.

Present edges carry what their sender computes in this run, all others what it computed in one plain
run on the corrupted input. Every receiver reads

    x_r = c_r + sum over present edges s -> r of (v_s - c_s),

with c_r the residual stream of the corrupted run (Conmy et al., arXiv:2304.14997).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pahq.adapters import Adapter
    from pahq.graph import Graph


@dataclass
class PlainRun:
    """Every sender's output and the residual stream, without any patch.

    Attributes:
        senders: ``(S, N, T, D)``.
        attention: ``(L, N, T, D)``, what heads of each layer read.
        mlp: ``(L, N, T, D)``, what MLPs read.
        final: ``(N, T, D)``, what the logits are made of.
    """

    senders: Tensor
    attention: Tensor
    mlp: Tensor
    final: Tensor

    def park(self) -> PlainRun:
        """Return the same run with its senders in the host's memory, if it is on a GPU."""
        if not self.senders.is_cuda:
            return self
        senders = torch.empty_like(self.senders, device="cpu", pin_memory=True)
        return PlainRun(senders.copy_(self.senders), self.attention, self.mlp, self.final)

    def read(self, graph: Graph, receiver: int) -> Tensor:
        """Return what a receiver read."""
        layer, part, _ = graph.place(receiver)
        if part == "logits":
            return self.final
        return (self.mlp if part == "mlp" else self.attention)[layer]


class Executor:
    """Runs circuits of a model.

    Args:
        adapter: Of the model.
        graph: With as many receivers of keys as the model has, or as it has query heads.
    """

    def __init__(self, adapter: Adapter, graph: Graph) -> None:
        self.adapter, self.graph = adapter, graph

    def outputs(self, layer: int, heads: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return outputs of some heads from their queries, keys and values ``(n, ..., T, d)``."""
        return self.adapter.write(layer, heads, self.adapter.attend(layer, q, k, v))

    def shared(self, part: str, index: int) -> int:
        """Return the model's head that a receiver of queries, keys or values stands for."""
        if part == "q" or self.graph.key_heads == self.adapter.key_heads:
            return index
        return index * self.adapter.key_heads // self.graph.key_heads

    def own(self, layer: int, part: str, receivers: Sequence[int], x: Tensor) -> Tensor:
        """Return queries, keys or values of receivers: of the model's head that each stands for."""
        return self.adapter.part(layer, part, [self.shared(part, j) for j in receivers], x)

    @torch.no_grad()
    def plain(self, ids: Tensor) -> PlainRun:
        """Run on ids ``(N, T)``."""
        adapter, graph = self.adapter, self.graph
        x = adapter.embed(ids)
        senders = x.new_empty(graph.senders, *x.shape)
        senders[0] = x
        attention, mlp = (x.new_empty(graph.layers, *x.shape) for _ in range(2))
        every = list(range(graph.heads))
        for layer in range(graph.layers):
            attention[layer] = x
            parts = [
                adapter.part(layer, part, range(count), x.expand(count, *x.shape))
                for part, count in (
                    ("q", graph.heads), ("k", adapter.key_heads), ("v", adapter.key_heads),
                )
            ]  # fmt: skip
            parts[1:] = (
                p.repeat_interleave(graph.heads // adapter.key_heads, 0) for p in parts[1:]
            )
            found = self.outputs(layer, every, *parts)
            first = graph.head(layer, 0)
            senders[first : first + graph.heads] = found
            after = x + found.sum(0)
            bias = adapter.output(layer)[1]
            if bias is not None:
                after = after + bias.to(x.dtype)
            mlp[layer] = x if graph.parallel else after
            senders[graph.mlp(layer)] = adapter.mlp(layer, mlp[layer])
            x = after + senders[graph.mlp(layer)]
        return PlainRun(senders, attention, mlp, x)

    @torch.no_grad()
    def run(self, present: Tensor, clean: Tensor, corrupted: PlainRun) -> State:
        """Run a circuit.

        Args:
            present: bool ``(S, R)``, its edges, or parts of them that there are.
            clean: int64 ``(N, T)``.
            corrupted: Of inputs of that shape.
        """
        return State(self, present, corrupted, self.adapter.embed(clean))


class State:
    """A circuit's run: what every sender computed.

    Attributes:
        present: ``(S, R)``, 1 where an edge is.
        senders: ``(S, N, T, D)``.
        final: ``(N, T, D)``, what the logits are made of.
    """

    def __init__(
        self, executor: Executor, present: Tensor, corrupted: PlainRun, first: Tensor
    ) -> None:
        graph, adapter = executor.graph, executor.adapter
        self.executor, self.corrupted = executor, corrupted
        self.present = present.to(first)
        self.senders = torch.zeros_like(corrupted.senders)
        self.senders[0] = first
        for layer in range(graph.layers):
            parts = {}
            for part, count in (("q", graph.heads), ("k", graph.key_heads), ("v", graph.key_heads)):
                parts[part] = executor.own(layer, part, range(count), self._read(layer, part))
            k, v = (parts[part].repeat_interleave(graph.group, 0) for part in "kv")
            heads = slice(graph.head(layer, 0), graph.mlp(layer))
            self.senders[heads] = executor.outputs(layer, range(graph.heads), parts["q"], k, v)
            self.senders[graph.mlp(layer)] = adapter.mlp(layer, self._read(layer, "mlp")[0])
        self.final = self._read(graph.layers, "logits")[0]

    def _read(self, layer: int, part: str) -> Tensor:
        """Return what a layer's receivers of one kind read, ``(n, N, T, D)``."""
        graph = self.executor.graph
        if part == "logits":
            columns = slice(graph.logits, graph.receivers)
        else:
            columns = graph.columns(layer, part)
        up = graph.upstream(columns.start)
        difference = self.senders[:up] - self.corrupted.senders[:up]
        base = self.corrupted.read(graph, columns.start)
        return base + torch.einsum("sr,sntd->rntd", self.present[:up, columns], difference)
