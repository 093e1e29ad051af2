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
    from collections.abc import Mapping, Sequence

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

    def park(self, *, streams: bool = False) -> PlainRun:
        """Return the same run with its senders in the host's memory, if it is on a GPU.

        Args:
            streams: Whether to move what heads and MLPs read, too.
        """
        if not self.senders.is_cuda:
            return self
        moved = [self.senders, *([self.attention, self.mlp] if streams else [])]
        host = [torch.empty_like(x, device="cpu", pin_memory=True).copy_(x) for x in moved]
        rest = [self.attention, self.mlp, self.final]
        return PlainRun(*host, *rest[len(host) - 1 :])

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
        return self.write(layer, heads, self.adapter.attend(layer, q, k, v))

    def write(self, layer: int, heads: Sequence[int], z: Tensor) -> Tensor:
        """Return what some heads write, from what they read ``(n, ..., T, d)``."""
        return self.adapter.write(layer, heads, z)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Return what an MLP writes, from the residual stream before its norm."""
        return self.adapter.mlp(layer, x)

    def part(self, layer: int, part: str, heads: Sequence[int], x: Tensor) -> Tensor:
        """Return queries, keys or values ``(n, ..., T, d)`` of some of the model's heads."""
        return self.adapter.part(layer, part, heads, x)

    def shared(self, part: str, index: int) -> int:
        """Return the model's head that a receiver of queries, keys or values stands for."""
        if part == "q" or self.graph.key_heads == self.adapter.key_heads:
            return index
        return index * self.adapter.key_heads // self.graph.key_heads

    def own(self, layer: int, part: str, receivers: Sequence[int], x: Tensor) -> Tensor:
        """Return queries, keys or values of receivers: of the model's head that each stands for."""
        return self.part(layer, part, [self.shared(part, j) for j in receivers], x)

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
                self.part(layer, part, range(count), x.expand(count, *x.shape))
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
            senders[graph.mlp(layer)] = self.mlp(layer, mlp[layer])
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
        first = self.adapter.embed(clean)
        known = (first - corrupted.senders[0].to(first.device))[None]
        return State(self, present, corrupted, known)


class State:
    """A circuit's run: what every sender computed, in one row or in several.

    Rows are runs of the same circuit in which some receivers read something else.

    Args:
        executor: Of the model.
        present: ``(S, R)``, 1 where an edge is.
        corrupted: Of inputs of the same shape; its senders may be on another device.
        known: ``(s, N, T, D)``, by how much the first s senders differ from the corrupted run in
            all rows; as many as come before some receiver.
        changes: By receiver, what is added to what it reads, ``(M, N, T, D)``.

    Attributes:
        made: ``(S - s, M, N, T, D)``, by how much the other senders differ from it.
        finals: ``(M, N, T, D)``, what the logits are made of.
    """

    def __init__(
        self,
        executor: Executor,
        present: Tensor,
        corrupted: PlainRun,
        known: Tensor,
        changes: Mapping[int, Tensor] | None = None,
    ) -> None:
        graph = executor.graph
        self.executor, self.corrupted, self.known = executor, corrupted, known
        self.present, self.changes = present.to(known), changes or {}
        rows = next((len(change) for change in self.changes.values()), 1)
        self.made = known.new_empty(graph.senders - len(known), rows, *known.shape[1:])
        for layer in range((len(known) - 1) // (graph.heads + 1), graph.layers):
            if len(known) <= graph.head(layer, 0):
                self._heads(layer)
            mlp = graph.mlp(layer)
            self._set(slice(mlp, mlp + 1), executor.mlp(layer, self._read(layer, "mlp")))
        self.finals = self._read(graph.layers, "logits")[0]

    @property
    def final(self) -> Tensor:
        """Return what the logits of the only row are made of, ``(N, T, D)``."""
        return self.finals[0]

    @property
    def senders(self) -> Tensor:
        """Return what every sender computed in the only row, ``(S, N, T, D)``."""
        moved = torch.cat([self.known, self.made[:, 0]])
        return moved + self.corrupted.senders.to(moved.device)

    def _heads(self, layer: int) -> None:
        executor, graph = self.executor, self.executor.graph
        parts = {}
        for part, count in (("q", graph.heads), ("k", graph.key_heads), ("v", graph.key_heads)):
            parts[part] = executor.own(layer, part, range(count), self._read(layer, part))
        k, v = (parts[part].repeat_interleave(graph.group, 0) for part in "kv")
        heads = slice(graph.head(layer, 0), graph.mlp(layer))
        self._set(heads, executor.outputs(layer, range(graph.heads), parts["q"], k, v))

    def _set(self, senders: slice, value: Tensor) -> None:
        """Keep what some senders computed, ``(n, M, N, T, D)``."""
        first = len(self.known)
        was = self.corrupted.senders[senders].to(value.device)[:, None]
        self.made[senders.start - first : senders.stop - first] = value - was

    def _read(self, layer: int, part: str) -> Tensor:
        """Return what a layer's receivers of one kind read, ``(n, M, N, T, D)``."""
        graph, first = self.executor.graph, len(self.known)
        if part == "logits":
            columns = slice(graph.logits, graph.receivers)
        else:
            columns = graph.columns(layer, part)
        up = graph.upstream(columns.start)
        base = self.corrupted.read(graph, columns.start)
        here = self.present[:up, columns]
        x = base + torch.einsum("sr,sntd->rntd", here[:first], self.known[:up])
        made = self.made[: max(up - first, 0)]
        if torch.is_grad_enabled():
            # what is written behind it must not change what a gradient needs
            made = made.clone()
        found = x[:, None] + torch.einsum("sr,smntd->rmntd", here[first:], made)
        for receiver, change in self.changes.items():
            if columns.start <= receiver < columns.stop:
                found[receiver - columns.start] += change
        return found
