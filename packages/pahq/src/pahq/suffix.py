"""What a change of what some receivers read does to everything behind them, in many rows at once.

Only what the change reaches is computed, and what it does is computed as the difference from the
current run: each product is that of the difference with the weights, added to what the current run
has. Rounding then errs by a share of the change, not by one of the activations, so that few bits
are enough to see a small effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from shared_kernels.ops.patching import Rounded, activation_delta, combine_norm
from shared_kernels.ops.patching.attention import suffix_attention

from pahq.current import DEAD, NARROW, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pahq.adapters import Adapter
    from pahq.current import Current
    from pahq.precision import Precision, Weights


class _Read(NamedTuple):
    """A receiver that reads senders which have changed; none if its change is given."""

    receiver: int
    need: int
    senders: list[int]


class _Group(NamedTuple):
    """Heads of which the same has changed.

    Attributes:
        need: How much of what they write counts.
        heads: Some of a layer.
        keys: Heads of keys that they see.
        places: int64 ``(n,)``, which of these each sees.
    """

    need: int
    heads: list[int]
    keys: list[int]
    places: Tensor


@dataclass
class _Heads:
    """Heads of a layer, and what of theirs has changed: ``(part, index)``."""

    layer: int
    reads: dict[tuple[str, int], _Read]
    heads: list[int]
    groups: list[_Group]


@dataclass
class _Mlp:
    layer: int
    read: _Read


class Suffix:
    """All that depends on what some receivers read, in a circuit.

    Args:
        current: The run of the circuit.
        receivers: Of one layer: some of its heads', or its MLP's, or the logits.
    """

    def __init__(self, current: Current, receivers: list[int]) -> None:
        self.current, self.receivers = current, receivers
        graph = current.executor.graph
        self.given = set(receivers)
        self.first, kind, _ = graph.place(receivers[0])
        self.changed: list[int] = []
        self.reads: list[_Read] = []
        self.steps: list[_Heads | _Mlp] = []
        self.final: _Read | None = None
        for layer in range(self.first, graph.layers):
            if layer > self.first or kind not in ("mlp", "logits"):
                self._add_heads(layer)
            if layer > self.first or kind != "logits":
                self._add_mlp(layer)
        self.final = self._read(graph.logits)
        self._place()

    # --- what there is to do ---------------------------------------------------------------------

    def _read(self, receiver: int) -> _Read | None:
        """Return what has changed of what a receiver reads, None if nothing."""
        need = self.current.need(receiver)
        if receiver in self.given:
            return _Read(receiver, need, [])
        if need == DEAD:
            return None
        edges = self.current.edges
        senders = [sender for sender in self.changed if edges[sender, receiver]]
        if not senders:
            return None
        self.reads.append(_Read(receiver, need, senders))
        return self.reads[-1]

    def _add_heads(self, layer: int) -> None:
        graph = self.current.executor.graph
        reads = {}
        for part in ("q", "k", "v"):
            first = graph.columns(layer, part).start
            for index in range(graph.heads if part == "q" else graph.key_heads):
                read = self._read(first + index)
                if read is not None and read.need:
                    reads[part, index] = read
        heads = [
            head
            for head in range(graph.heads)
            if self.current.needs[graph.head(layer, head)]
            and any(
                key in reads
                for key in (("q", head), ("k", head // graph.group), ("v", head // graph.group))
            )
        ]
        if heads:
            self.steps.append(_Heads(layer, reads, heads, self._groups(layer, heads, reads)))
            self.changed += [graph.head(layer, head) for head in heads]

    def _groups(
        self, layer: int, heads: list[int], reads: dict[tuple[str, int], _Read]
    ) -> list[_Group]:
        graph = self.current.executor.graph
        alike: dict[tuple, list[int]] = {}
        for head in heads:
            keys = (("q", head), ("k", head // graph.group), ("v", head // graph.group))
            need = int(self.current.needs[graph.head(layer, head)])
            alike.setdefault((need, *(key in reads for key in keys)), []).append(head)
        found = []
        for (need, *_), some in alike.items():
            keys = sorted({head // graph.group for head in some})
            places = torch.tensor([keys.index(head // graph.group) for head in some])
            found.append(_Group(need, some, keys, places.to(self.current.device)))
        return found

    def _add_mlp(self, layer: int) -> None:
        graph = self.current.executor.graph
        read = self._read(graph.columns(layer, "mlp").start)
        if read is not None and read.need:
            self.steps.append(_Mlp(layer, read))
            self.changed.append(graph.mlp(layer))

    def _made(self, step: _Heads | _Mlp) -> list[int]:
        """Return the senders that a step computes."""
        graph = self.current.executor.graph
        if isinstance(step, _Mlp):
            return [graph.mlp(step.layer)]
        return [graph.head(step.layer, head) for head in step.heads]

    def _place(self) -> None:
        """Give each sender a place in a buffer of its kind, free again after its last reader."""
        graph, needs = self.current.executor.graph, self.current.needs
        last: dict[int, int] = {}
        for read in self.reads:
            for sender in read.senders:
                last[sender] = read.receiver
        self.slots: dict[int, int] = {}
        self.counts = {NARROW: 0, WIDE: 0}
        free: dict[int, list[int]] = {NARROW: [], WIDE: []}
        waiting: list[int] = []
        for step in self.steps:
            begin = graph.columns(step.layer, "mlp" if isinstance(step, _Mlp) else "q").start
            # what a step writes may take the place of what steps before it were the last to read
            for sender in [s for s in waiting if last.get(s, -1) < begin]:
                free[int(needs[sender])].append(self.slots[sender])
                waiting.remove(sender)
            for sender in self._made(step):
                kind = int(needs[sender])
                if free[kind]:
                    self.slots[sender] = free[kind].pop()
                else:
                    self.slots[sender] = self.counts[kind]
                    self.counts[kind] += 1
                waiting.append(sender)
        lists, offsets = [], []
        for read in self.reads:
            offsets.append(len(lists))
            lists += [
                self.slots[s] if needs[s] == WIDE else -1 - self.slots[s] for s in read.senders
            ]
        device = self.current.device
        self.entries = torch.tensor(lists, dtype=torch.int32, device=device)
        ends = [end for read in self.reads for end in (0, len(read.senders))]
        self.offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        self.at_entry = {
            read.receiver: (place, begin)
            for place, (read, begin) in enumerate(zip(self.reads, offsets, strict=True))
        }

    def row_bytes(self, held: torch.dtype) -> int:
        """Return the bytes of a row, of all that is held at once."""
        current = self.current
        narrow, width = current.examples, current.width
        wide = narrow * current.tokens
        kept = (self.counts[WIDE] * wide + self.counts[NARROW] * narrow) * width * held.itemsize
        needs = [current.need(r) for r in [*self.receivers, *(r.receiver for r in self.reads)]]
        tokens = wide if WIDE in needs else narrow
        # what senders give, that behind the norm, and what a query or an MLP makes of it
        return kept + tokens * width * (2 * current.dtype.itemsize + 2 * held.itemsize)

    # --- one batch -------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, precision: Precision, weights: Weights) -> None:
        """Make all that batches need of the current run and of weights, so that none makes it."""
        current = self.current
        held = precision.held or current.dtype
        multiplied = precision.multiplied or current.dtype
        for receiver in [*self.receivers, *(read.receiver for read in self.reads)]:
            current.input(receiver)
        precise: list[tuple] = []
        for step in self.steps:
            layer = step.layer
            if isinstance(step, _Mlp):
                current.before(layer)
                dtype = weights.operand("mlp", layer, multiplied)
                weights.ready(("inner", layer), dtype)
                weights.ready(("outer", layer), dtype)
                continue
            dtype = weights.operand("heads", layer, multiplied)
            for (part, index), read in step.reads.items():
                current.flat(layer, part, index)
                key = (part, layer, current.executor.shared(part, index))
                if read.receiver in self.given:
                    precise.append(key)
                else:
                    weights.ready(key, dtype)
            for head in step.heads:
                current.head(layer, head)
                weights.ready(("output", layer, head), held)
        weights.hold(precise)

    @torch.no_grad()
    def run(
        self,
        given: dict[int, Rounded],
        rows: int,
        precision: Precision,
        weights: Weights,
        budget: int,
        take: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor | None:
        """Return how much final states at answers change, ``(M, N, D)``; None if they do not.

        Args:
            given: By receiver, how much what it reads changes behind its norm, ``(M, tokens, D)``;
                of the logits, before it, and that is what is returned.
            rows: M.
            precision: Of all else.
            weights: Of the model.
            budget: Bytes that rows may take.
            take: Told of each sender and its change ``(M, tokens, D)``.
        """
        current = self.current
        logits = current.executor.graph.logits
        if logits in given:
            return given[logits].values
        batch = _Batch(self, given, rows, precision, weights, budget)
        for step in self.steps:
            if isinstance(step, _Mlp):
                batch.mlp(step)
            else:
                batch.heads(step)
            if take is not None:
                for sender in self._made(step):
                    take(sender, batch.slot(sender))
        return None if self.final is None else batch.read(self.final).values


class _Batch:
    """Rows on their way through a suffix."""

    def __init__(
        self,
        suffix: Suffix,
        given: dict[int, Rounded],
        rows: int,
        precision: Precision,
        weights: Weights,
        budget: int,
    ) -> None:
        self.suffix, self.given, self.rows, self.weights = suffix, given, rows, weights
        current = self.current = suffix.current
        self.adapter: Adapter = current.executor.adapter
        self.held = precision.held or current.dtype
        self.multiplied = precision.multiplied or current.dtype
        self.budget = budget
        width = current.width
        tokens = {WIDE: current.examples * current.tokens, NARROW: current.examples}
        self.values = {
            kind: torch.empty(
                count, rows, tokens[kind], width, dtype=self.held, device=current.device
            )
            for kind, count in suffix.counts.items()
        }

    def slot(self, sender: int) -> Tensor:
        """Return where the change of a sender is, ``(M, tokens, D)``."""
        return self.values[int(self.current.needs[sender])][self.suffix.slots[sender]]

    def read(self, read: _Read, dtype: torch.dtype | None = None) -> Rounded:
        """Return how much a receiver's input changes, behind its norm, ``(M, tokens, D)``."""
        if read.receiver in self.given:
            return self.given[read.receiver]
        suffix, current = self.suffix, self.current
        number, begin = suffix.at_entry[read.receiver]
        x = current.input(read.receiver)[None]
        norm = current.norm(read.receiver)
        kind, weight, eps = ("none", None, 0.0) if norm is None else norm.scaling(x)
        found = combine_norm(
            x, self.values[WIDE], self.values[NARROW],
            suffix.offsets[2 * number : 2 * number + 2],
            suffix.entries[begin : begin + len(read.senders)],
            at=None if read.need == WIDE else current.at, weight=weight, kind=kind, eps=eps,
            dtype=dtype or x.dtype,
        )  # fmt: skip
        return Rounded(found.values[0], None if found.scale is None else found.scale[0])

    # --- heads -----------------------------------------------------------------------------------

    def heads(self, step: _Heads) -> None:
        """Let heads of a layer see what has changed."""
        current, layer = self.current, step.layer
        now, dtype = {}, self.weights.operand("heads", layer, self.multiplied)
        for (part, index), read in step.reads.items():
            delta = self.read(read, dtype)
            head = current.executor.shared(part, index)
            moved = self.weights.times((part, layer, head), delta)
            flat = current.flat(layer, part, index) + moved
            now[part, index] = current.turned(layer, part, flat[None], read.need)[0]
        for group in step.groups:
            self._attend(layer, group, now)

    def _attend(self, layer: int, group: _Group, now: dict[tuple[str, int], Tensor]) -> None:
        current = self.current

        def stacked(part: str, indices: list[int]) -> Tensor:
            found = []
            for index in indices:
                mine = now.get((part, index))
                found.append(current.part(layer, part, index)[None] if mine is None else mine)
            return torch.stack(found) if len(found) > 1 else found[0][None]

        found = suffix_attention(
            stacked("q", group.heads), stacked("k", group.keys), stacked("v", group.keys),
            torch.stack([current.head(layer, head) for head in group.heads]), group.places,
            at=None if group.need == WIDE else current.positions,
            scale=self.adapter.scale(layer), window=self.adapter.window(layer),
            softcap=self.adapter.softcap(layer), causal=self.adapter.causal, dtype=self.held,
        )  # fmt: skip
        for head, delta in zip(group.heads, found, strict=True):
            out = self.slot(current.executor.graph.head(layer, head))
            delta = delta.flatten(1, 2).expand(self.rows, -1, -1)
            self.weights.times(("output", layer, head), Rounded(delta, None), out)

    # --- MLPs ------------------------------------------------------------------------------------

    def mlp(self, step: _Mlp) -> None:
        """Let an MLP see what has changed."""
        layer = step.layer
        dtype = self.weights.operand("mlp", layer, self.multiplied)
        delta, scale = self.read(step.read, dtype)
        out = self.slot(self.current.executor.graph.mlp(layer))
        base = self.current.before(layer)
        block = self.adapter.feed_forward(layer)
        # of what an MLP has inside, a part of the rows at a time
        inside = base.shape[1] * (1 if block.gate is None else 1.5) * self.held.itemsize
        size = max(1, int(self.budget / 4 / inside) // delta.shape[1])
        for begin in range(0, len(delta), size):
            some = slice(begin, begin + size)
            part = Rounded(delta[some], None if scale is None else scale[some])
            inside = self.weights.times(("inner", layer), part)
            acted = activation_delta(
                inside, base, act=block.act, gated=block.gate is not None, dtype=dtype
            )
            self.weights.times(("outer", layer), acted, out[some])
