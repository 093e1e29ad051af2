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

    def own(self, layer: int, part: str, receivers: Sequence[int], x: Tensor) -> Tensor:
        """Return queries, keys or values of receivers: of the model's head that each stands for."""
        shared = self.adapter.key_heads
        if part != "q" and self.graph.key_heads != shared:
            receivers = [j * shared // self.graph.key_heads for j in receivers]
        return self.adapter.part(layer, part, receivers, x)

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
            present: bool ``(S, R)``, its edges.
            clean: int64 ``(N, T)``.
            corrupted: Of inputs of that shape.
        """
        state = State(self, present, corrupted, self.adapter.embed(clean))
        state.compute()
        return state


class State:
    """A circuit's run: what every sender computed and every receiver read.

    Attributes:
        present: bool ``(S, R)`` on the CPU, where it is looked at often.
        senders: ``(S, N, T, D)``.
        inputs: ``(R, N, T, D)``.
        parts: Of each layer, by ``q``, ``k`` and ``v``, what heads made of their inputs,
            ``(n, N, T, d)``.
    """

    def __init__(self, executor: Executor, present: Tensor, corrupted: PlainRun, first: Tensor):
        graph = executor.graph
        self.executor, self.present, self.corrupted = executor, present.cpu().clone(), corrupted
        self.senders = torch.zeros_like(corrupted.senders)
        self.senders[0] = first
        self.inputs = first.new_empty(graph.receivers, *first.shape)
        self.parts: list[dict[str, Tensor]] = [{} for _ in range(graph.layers)]

    @property
    def final(self) -> Tensor:
        """Return what the logits are made of."""
        return self.inputs[self.executor.graph.logits]

    def compute(self, first: int = 0) -> None:
        """Compute layers from the first on, from what there is before."""
        executor, graph = self.executor, self.executor.graph
        for layer in range(first, graph.layers):
            for part in ("q", "k", "v"):
                self.read(layer, part)
            self.attend(layer)
            self.read(layer, "mlp")
            self.senders[graph.mlp(layer)] = executor.adapter.mlp(
                layer, self.inputs[graph.columns(layer, "mlp")][0]
            )
        self.read(graph.layers, "logits")

    def read(self, layer: int, part: str) -> None:
        """Put together what a layer's receivers of one kind read."""
        graph = self.executor.graph
        if part == "logits":
            columns = slice(graph.logits, graph.receivers)
        else:
            columns = graph.columns(layer, part)
        up = graph.upstream(columns.start)
        weights = self.present[:up, columns].to(self.senders)
        difference = self.senders[:up] - self.corrupted.senders[:up]
        base = self.corrupted.read(graph, columns.start)
        self.inputs[columns] = base + torch.einsum("sr,sntd->rntd", weights, difference)

    def attend(self, layer: int) -> None:
        """Compute all heads of a layer from what they read."""
        executor, graph = self.executor, self.executor.graph
        parts = self.parts[layer]
        for part, count in (("q", graph.heads), ("k", graph.key_heads), ("v", graph.key_heads)):
            columns = graph.columns(layer, part)
            parts[part] = executor.own(layer, part, range(count), self.inputs[columns])
        k, v = (parts[part].repeat_interleave(graph.group, 0) for part in "kv")
        first = graph.head(layer, 0)
        self.senders[first : first + graph.heads] = executor.outputs(
            layer, range(graph.heads), parts["q"], k, v
        )

    # --- rows ----------------------------------------------------------------------------------

    def live(self) -> tuple[Tensor, Tensor]:
        """Return which senders ``(S,)`` and receivers ``(R,)`` reach the logits."""
        graph = self.executor.graph
        present = self.present
        senders = torch.zeros(graph.senders, dtype=torch.bool)
        receivers = torch.zeros(graph.receivers, dtype=torch.bool)
        receivers[graph.logits] = True
        senders |= present[:, graph.logits]
        for receiver in reversed(range(graph.logits)):
            if bool(senders[graph.readers(receiver)].any()):
                receivers[receiver] = True
                senders |= present[:, receiver]
        return senders, receivers

    @torch.no_grad()
    def change(self, deltas: dict[int, Tensor], live: Tensor) -> Change:
        """Let receivers read something else, in several rows at once, and follow what it changes.

        Args:
            deltas: ``(M, N, T, D)`` by receiver, added to what it reads; of one layer, and of its
                heads or of its MLP.
            live: Of `live`, the senders that can matter.
        """
        graph, executor = self.executor.graph, self.executor
        made = Change(dict(deltas), {}, {})
        first, kind, _ = graph.place(next(iter(deltas)))
        for layer in range(first, graph.layers):
            if layer > first or kind != "mlp":
                if layer > first:
                    for part in ("q", "k", "v"):
                        self._pass_on(made, graph.columns(layer, part), live)
                self._heads(made, layer, live)
            column = graph.columns(layer, "mlp")
            if layer > first or kind != "mlp":
                self._pass_on(made, column, live)
            moved = made.inputs.get(column.start)
            sender = graph.mlp(layer)
            if moved is not None and bool(live[sender]):
                now = executor.adapter.mlp(layer, self.inputs[column.start] + moved)
                made.senders[sender] = now - self.senders[sender]
        if kind != "logits":
            self._pass_on(made, slice(graph.logits, graph.receivers), live)
        return made

    def _pass_on(self, made: Change, columns: slice, live: Tensor) -> None:
        """Add up what receivers read of senders that have changed."""
        graph = self.executor.graph
        if not made.senders:
            return
        changed = list(made.senders)
        weights = self.present[changed, columns]
        wanted = [
            place
            for place, receiver in enumerate(range(columns.start, columns.stop))
            if bool(weights[:, place].any())
            and (receiver == graph.logits or bool(live[graph.readers(receiver)].any()))
        ]
        if not wanted:
            return
        values = torch.stack([made.senders[sender] for sender in changed])
        moved = torch.einsum(
            "sr,smntd->rmntd", weights[:, wanted].to(values), values
        )  # fmt: skip
        for place, value in zip(wanted, moved, strict=True):
            made.inputs[columns.start + place] = value

    def _heads(self, made: Change, layer: int, live: Tensor) -> None:
        graph, executor = self.executor.graph, self.executor
        found: dict[str, dict[int, Tensor]] = {}
        for part in ("q", "k", "v"):
            columns = graph.columns(layer, part)
            moved = [r for r in range(columns.start, columns.stop) if r in made.inputs]
            found[part] = {}
            if moved:
                x = torch.stack([self.inputs[r] + made.inputs[r] for r in moved])
                places = [r - columns.start for r in moved]
                now = executor.own(layer, part, places, x)
                found[part] = dict(zip(places, now, strict=True))
                made.parts |= {(layer, part, j): y for j, y in found[part].items()}
        heads = [
            h
            for h in range(graph.heads)
            if bool(live[graph.head(layer, h)])
            and (
                h in found["q"] or h // graph.group in found["k"] or h // graph.group in found["v"]
            )
        ]
        if not heads:
            return
        taken = []
        for part in ("q", "k", "v"):
            places = heads if part == "q" else [h // graph.group for h in heads]
            base, now = self.parts[layer][part], found[part]
            if not any(j in now for j in places):
                taken.append(base[places][:, None])
                continue
            rows = len(next(iter(now.values())))
            taken.append(
                torch.stack([now.get(j, base[j].expand(rows, *base[j].shape)) for j in places])
            )
        out = executor.outputs(layer, heads, *taken)
        for head, value in zip(heads, out, strict=True):
            sender = graph.head(layer, head)
            made.senders[sender] = value - self.senders[sender]

    def take(self, made: Change, row: int) -> None:
        """Become what a row of a change is."""
        for receiver, value in made.inputs.items():
            self.inputs[receiver] += value[row]
        for sender, value in made.senders.items():
            self.senders[sender] += value[row]
        for (layer, part, index), value in made.parts.items():
            self.parts[layer][part][index] = value[row]


@dataclass
class Change:
    """What rows change: by receiver and by sender ``(M, N, T, D)``, added to what there is.

    Attributes:
        inputs: Of receivers.
        senders: Of senders.
        parts: Of layer, part and index, what a head's receiver makes of its input now.
    """

    inputs: dict[int, Tensor]
    senders: dict[int, Tensor]
    parts: dict[tuple[int, str, int], Tensor]
