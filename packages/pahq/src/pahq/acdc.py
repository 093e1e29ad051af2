"""ACDC with the decisions of the sequential algorithm, many edges at a time.

Edges of one receiver are removed one after the other, each for good if the metric rises by less
than a threshold (Conmy et al., arXiv:2304.14997, algorithm 1). Here rows of one batch have the
first edge removed, the first two, the first three: as long as all of them go, one batch decides as
many edges as it has rows; after the first one that stays, the next batch begins. Where an edge is
expected to stay, the rows behind it have it: they are right as long as the guesses are.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from torch import Tensor

    from pahq.forward import Change, State

_LOG = logging.getLogger(__name__)
ORDERS = ("acdc", "reverse", "shuffle")


@dataclass
class Search:
    """How a search went.

    Attributes:
        value: The metric of the circuit.
        tested: Edges that were tried.
        skipped: Edges removed because nothing reads what they reach, or with all of their head's.
        kept: Edges that stayed.
        batches: Forward passes over what follows a receiver.
        rows: In all of them.
        effects: By edge ``(sender, receiver)``, what its removal added to the metric when it was
            tried.
        direct: By receiver, what the removal of all its edges at once added.
    """

    value: float = 0.0
    tested: int = 0
    skipped: int = 0
    kept: int = 0
    batches: int = 0
    rows: int = 0
    effects: dict[tuple[int, int], float] = field(default_factory=dict)
    direct: dict[int, float] = field(default_factory=dict)


class Batches:
    """Runs rows of removals, as many at a time as fit into memory.

    Args:
        state: What is changed.
        metric: Of final states ``(M, N, T, D)``, a number for each row ``(M,)``.
        rows: Of a batch at most.
        found: Told of batches and rows.
    """

    def __init__(
        self, state: State, metric: Callable[[Tensor], Tensor], rows: int, found: Search
    ) -> None:
        self.state, self.metric, self.rows, self.found = state, metric, rows, found

    def run(
        self, deltas: dict[int, Tensor], live: Tensor, names: Sequence[str]
    ) -> tuple[Change, list[float]] | None:
        """Return what rows change, and their metric; None where only fewer rows will fit.

        Args:
            deltas: ``(M, N, T, D)`` by receiver.
            live: Senders that can matter.
            names: Of what rows remove, for an error.

        Raises:
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one row fits.
        """
        state, final = self.state, self.state.executor.graph.logits
        try:
            made = state.change(deltas, live)
            values = [self.found.value] * len(names)
            if final in made.inputs:
                values = self.metric(state.final + made.inputs[final]).tolist()
        except torch.OutOfMemoryError as error:
            if len(names) == 1:
                raise MemoryError(
                    "one row does not fit into memory; give fewer or shorter examples"
                ) from error
            self.rows = len(names) // 2
            _LOG.warning("out of memory with %d rows: goes on with %d rows", len(names), self.rows)
            torch.cuda.empty_cache()
            return None
        for value, name in zip(values, names, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"metric: {value} without {name}")
        self.found.batches += 1
        self.found.rows += len(values)
        return made, values


class Acdc:
    """Removes edges of a run until each one left matters.

    Args:
        state: Of all edges; it is the circuit's afterwards.
        metric: Of final states ``(M, N, T, D)``, a number for each row ``(M,)``, to be kept low.
        threshold: An edge stays if its removal adds at least so much.
        rows: Of a batch at most; halved where they do not fit into memory.
        absolute: Whether an edge also stays if its removal takes off so much.
        direct: Whether all edges of a query's, a key's or a value's input are tried at once before
            they are tried one by one: the direct edges of the authors' code.
        order: Of the edges of a receiver: ``acdc`` tries the nearest sender first, ``reverse`` the
            farthest, ``shuffle`` any.
        seed: Of shuffling.
        expected: bool ``(S, R)``, edges that are expected to stay. It decides how many batches
            there are, and no edge.
        bar: A tqdm to tell.
    """

    def __init__(
        self,
        state: State,
        metric: Callable[[Tensor], Tensor],
        threshold: float,
        *,
        rows: int = 32,
        absolute: bool = False,
        direct: bool = False,
        order: str = "acdc",
        seed: int = 0,
        expected: Tensor | None = None,
        bar: Any = None,
    ) -> None:
        self.state, self.metric, self.threshold = state, metric, threshold
        self.absolute, self.direct, self.bar = absolute, direct, bar
        self.order, self.seed, self.expected = order, seed, expected
        self.graph = state.executor.graph
        self.found = Search(self._value())
        self.batches = Batches(state, metric, rows, self.found)

    @torch.no_grad()
    def _value(self) -> float:
        return float(self.metric(self.state.final[None])[0])

    # --- the way through the graph ---------------------------------------------------------------

    @torch.no_grad()
    def layer(self, layer: int) -> None:
        """Decide all edges into a layer; that of number L has the logits alone.

        Raises:
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one row fits.
        """
        graph = self.graph
        if layer == graph.layers:
            self._receiver(graph.logits)
            return
        self._receiver(graph.columns(layer, "mlp").start)
        heads = [
            receiver
            for part in ("v", "k", "q")
            for columns in [graph.columns(layer, part)]
            for receiver in reversed(range(columns.start, columns.stop))
        ]
        if self.direct:
            self._direct(heads)
        for receiver in heads:
            self._receiver(receiver)
        # what was added up row by row is computed once more, so that nothing adds up over layers,
        # and a search that goes on from here has the same numbers
        self.state.compute(layer)
        self.found.value = self._value()

    def _receiver(self, receiver: int) -> None:
        """Decide the edges into a receiver."""
        state = self.state
        live, receivers = state.live()
        candidates = self._candidates(receiver)
        if not bool(receivers[receiver]):
            self._cut(receiver)
            return
        while candidates:
            batch = candidates[: self.batches.rows]
            base = state.corrupted.senders[batch] - state.senders[batch]
            guess = [False] * len(batch)
            if self.expected is not None:
                guess = self.expected[batch, receiver].tolist()
            mix = _rows_of(guess, base)
            deltas = {receiver: torch.einsum("mi,intd->mntd", mix, base)}
            names = [f"edge {self.graph.name(sender, receiver)}" for sender in batch]
            ran = self.batches.run(deltas, live, names)
            if ran is None:
                continue
            made, values = ran
            kept, effects, last = self._decide(values, guess)
            for sender, effect, stays in zip(batch, effects, kept, strict=False):
                self.found.effects[sender, receiver] = effect
                if not stays:
                    state.present[sender, receiver] = False
            if last is not None:
                state.take(made, last)
            self.found.tested += len(kept)
            self.found.kept += sum(kept)
            candidates = candidates[len(kept) :]
            self._tell(len(kept))

    def _direct(self, receivers: list[int]) -> None:
        """Decide of receivers whether they are to read anything but the corrupted run."""
        state = self.state
        live, alive = state.live()
        candidates = [r for r in receivers if bool(alive[r])]
        while candidates:
            batch = candidates[: self.batches.rows]
            base = torch.stack(
                [state.corrupted.read(self.graph, r) - state.inputs[r] for r in batch]
            )
            guess = [False] * len(batch)
            mix = _rows_of(guess, base)
            deltas = {r: mix[:, i, None, None, None] * base[i] for i, r in enumerate(batch)}
            names = [f"any edge into {self.graph.receiver_names[r]}" for r in batch]
            ran = self.batches.run(deltas, live, names)
            if ran is None:
                continue
            made, values = ran
            kept, effects, last = self._decide(values, guess)
            if last is not None:
                state.take(made, last)
            for receiver, effect, stays in zip(batch, effects, kept, strict=False):
                self.found.direct[receiver] = effect
                if not stays:
                    self._cut(receiver)
            candidates = candidates[len(kept) :]

    def _cut(self, receiver: int) -> None:
        """Remove all edges into a receiver."""
        state, count = self.state, int(self.state.present[:, receiver].sum())
        state.present[:, receiver] = False
        state.inputs[receiver] = state.corrupted.read(self.graph, receiver)
        self.found.skipped += count
        self._tell(count)

    def _candidates(self, receiver: int) -> list[int]:
        found = self.graph.candidates(receiver)
        if self.order == "reverse":
            found.reverse()
        elif self.order == "shuffle":
            # each receiver's own, so that a search can go on anywhere
            draws = np.random.default_rng([self.seed, receiver])
            found = [found[i] for i in draws.permutation(len(found))]
        return [s for s in found if bool(self.state.present[s, receiver])]

    def _tell(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)
            values = {"kept": self.found.kept, "metric": f"{self.found.value:.4f}"}
            self.bar.set_postfix(values, refresh=False)

    # --- one batch -------------------------------------------------------------------------------

    def _decide(
        self, values: list[float], guess: list[bool]
    ) -> tuple[list[bool], list[float], int | None]:
        """Return whether edges stay and their effects, up to the first wrong guess, and the row."""
        kept: list[bool] = []
        effects: list[float] = []
        last = None
        for row, (value, expected) in enumerate(zip(values, guess, strict=True)):
            effect = value - self.found.value
            stays = (abs(effect) if self.absolute else effect) >= self.threshold
            effects.append(effect)
            kept.append(stays)
            if not stays:
                self.found.value, last = value, row
            if stays != expected:
                break
        return kept, effects, last


def _rows_of(guess: list[bool], like: Tensor) -> Tensor:
    """Return which candidates ``(M, M)`` are removed in each row: its own, and those before it."""
    count = len(guess)
    before = torch.ones(count, count).tril(-1) * (~torch.tensor(guess)).float()
    return (before + torch.eye(count)).to(like)


@torch.no_grad()
def effects(
    state: State,
    metric: Callable[[Tensor], Tensor],
    edges: Tensor,
    *,
    rows: int = 32,
    bar: Any = None,
) -> Search:
    """Remove edges of a run, each alone, and tell what that adds to the metric.

    Args:
        state: Of all edges; it stays as it is.
        metric: Of final states ``(M, N, T, D)``, a number for each row ``(M,)``.
        edges: bool ``(S, R)``, those to remove.
        rows: Of a batch at most; halved where they do not fit into memory.
        bar: A tqdm to tell.

    Raises:
        FloatingPointError: The metric is not finite.
        MemoryError: Not even one row fits.
    """
    graph = state.executor.graph
    found = Search(float(metric(state.final[None])[0]))
    batches = Batches(state, metric, rows, found)
    live, _ = state.live()
    for receiver in graph.order():
        candidates = [s for s in graph.candidates(receiver) if bool(edges[s, receiver])]
        while candidates:
            batch = candidates[: batches.rows]
            deltas = {receiver: state.corrupted.senders[batch] - state.senders[batch]}
            names = [f"edge {graph.name(sender, receiver)}" for sender in batch]
            ran = batches.run(deltas, live, names)
            if ran is None:
                continue
            for sender, value in zip(batch, ran[1], strict=True):
                found.effects[sender, receiver] = value - found.value
            found.tested += len(batch)
            candidates = candidates[len(batch) :]
            if bar is not None:
                bar.update(len(batch))
    return found
