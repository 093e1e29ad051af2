"""ACDC with the decisions of the sequential algorithm, many edges at a time.

Edges of one receiver are removed one after the other, each for good if the metric rises by less
than a threshold (Conmy et al., arXiv:2304.14997, algorithm 1). Here rows of one batch have the
first edge removed, the first two, the first three: as long as all of them go, one batch decides as
many edges as it has rows; after the first one that stays, the next batch begins. Where an edge is
expected to stay, the rows behind it have it: they are right as long as the guesses are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from pahq.batches import Search, Settings
from pahq.current import DEAD, Current
from pahq.rows import Removals, Rows
from pahq.whole import Whole, WholeRows

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from pahq.metrics import Metric

ORDERS = ("acdc", "reverse", "shuffle")
#: What rounding of float32 makes of a metric.
_ROUNDING = 1e-7
#: Receivers that are tried at once.
_DIRECT = 16


class Acdc:
    """Removes edges of a run until each one left matters.

    Args:
        current: Of all edges; it is the circuit's afterwards.
        metric: To be kept low.
        threshold: An edge stays if its removal adds at least so much.
        settings: Of batches.
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
        current: Current | Whole,
        metric: Metric,
        threshold: float,
        settings: Settings | None = None,
        *,
        absolute: bool = False,
        direct: bool = False,
        order: str = "acdc",
        seed: int = 0,
        expected: Tensor | None = None,
        bar: Any = None,
    ) -> None:
        self.current, self.metric, self.threshold = current, metric, threshold
        self.absolute, self.direct, self.bar = absolute, direct, bar
        self.order, self.seed, self.expected = order, seed, expected
        self.graph = current.executor.graph
        self.found = Search()
        self.rows = rows_of(current, metric, settings or Settings(), self.found)
        self.rows.begin()

    # --- the way through the graph ---------------------------------------------------------------

    @torch.no_grad()
    def layer(self, layer: int) -> None:
        """Decide all edges into a layer; that of number L has the logits alone.

        Raises:
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one row fits.
        """
        graph = self.graph
        self.rows.anew()
        if layer == graph.layers:
            self._receiver(graph.logits)
        else:
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
        if layer < graph.layers and isinstance(self.current, Current):
            self.current.release(layer)
        # what was added up row by row is computed once more, so that nothing adds up over layers,
        # and a search that goes on from here has the same numbers
        self.current.compute(layer)
        self.rows.begin()

    def continue_from(self, present: Tensor, layer: int) -> None:
        """Take the edges into a layer, and those into all behind it, as decided."""
        current, graph = self.current, self.graph
        current.present.copy_(present)
        current.reset()
        for receiver in graph.order():
            if graph.place(receiver)[0] >= layer:
                current.close(receiver)
        if isinstance(current, Current):
            for behind in range(layer, graph.layers):
                current.release(behind)
        current.compute(layer)
        self.rows.begin()

    def _receiver(self, receiver: int) -> None:
        """Decide the edges into a receiver."""
        current, rows = self.current, self.rows
        if current.need(receiver) == DEAD:
            count = int(current.edges[:, receiver].sum())
            current.edges[:, receiver] = False
            self._skipped(count)
            return
        candidates = self._candidates(receiver)
        removals = rows.removals(receiver)
        last = _Last(self.found.value)
        while candidates:
            senders = candidates[: removals.fitting()]
            guess = [False] * len(senders)
            if self.expected is not None:
                guess = self.expected[senders, receiver].tolist()
            drop = [not stays for stays in guess]
            names = [f"edge {self.graph.name(sender, receiver)}" for sender in senders]
            ran = removals.remove(senders, drop, names)
            if ran is None:
                continue
            check = None
            if isinstance(removals, Removals):
                check = partial(removals.again, senders, drop, names)
            kept, effects = self._decide(ran, guess, last, check)
            rows.went(len(kept), kept[-1] != guess[len(kept) - 1])
            for sender, effect in zip(senders, effects, strict=False):
                self.found.effects[sender, receiver] = effect
            removals.drop([s for s, stays in zip(senders, kept, strict=False) if not stays])
            self.found.tested += len(kept)
            self.found.kept += sum(kept)
            candidates = candidates[len(kept) :]
            # far from the current run, too many decisions would have to be made again
            far = not candidates or 4 * last.doubt > self.threshold
            if isinstance(removals, Removals) and removals.pending and far:
                removals.take()
                last = _Last(self.found.value)
            self._tell(len(kept))
        current.close(receiver)

    def _direct(self, receivers: list[int]) -> None:
        """Decide of receivers whether they are to read anything but the corrupted run."""
        candidates = [r for r in receivers if self.current.need(r) != DEAD]
        while candidates:
            batch = candidates[: min(_DIRECT, self.rows.most) * self.rows.ranks.count]
            names = [f"any edge into {self.graph.receiver_names[r]}" for r in batch]
            ran = self.rows.together(batch, names)
            if ran is None:
                continue
            kept, effects = self._decide(ran, [False] * len(batch), _Last(self.found.value), None)
            self.found.direct.update(zip(batch, effects, strict=False))
            cut = [r for r, stays in zip(batch, kept, strict=False) if not stays]
            if cut:
                count = int(self.current.edges[:, cut].sum())
                self.rows.empty(cut)
                self._skipped(count)
            candidates = candidates[len(kept) :]

    def _skipped(self, count: int) -> None:
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
        return [s for s in found if self.current.edges[s, receiver]]

    def _tell(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)
            values = {"kept": self.found.kept, "metric": f"{self.found.value:.4f}"}
            self.bar.set_postfix(values, refresh=False)

    # --- one batch -------------------------------------------------------------------------------

    def _decide(
        self,
        ran: tuple[list[float], list[float]],
        guess: list[bool],
        last: _Last,
        check: Callable[[list[int]], list[float]] | None,
    ) -> tuple[list[bool], list[float]]:
        """Return whether edges stay and their effects, up to the first wrong guess.

        Args:
            ran: Metric of rows, and how far it may be off.
            guess: Which edges the rows behind them have.
            last: What is removed so far; becomes that of the last row whose edge went.
            check: Gives the effects of some rows in high precision.
        """
        effects, doubts, was = [], [], last
        for value, doubt, stays in zip(*ran, guess, strict=True):
            effects.append(value - was.value)
            doubts.append(doubt + was.doubt)
            if not stays:
                was = _Last(value, doubt)
        size = abs if self.absolute else float
        unsure = [
            place
            for place, (effect, doubt) in enumerate(zip(effects, doubts, strict=True))
            if doubt and abs(size(effect) - self.threshold) <= doubt + _ROUNDING
        ]
        sure = {
            place: size(effect) >= self.threshold
            for place, effect in enumerate(effects)
            if place not in unsure
        }
        stop = next((place for place, stays in sure.items() if stays != guess[place]), len(effects))
        unsure = [place for place in unsure if place < stop]
        if unsure and check is not None:
            for place, effect in zip(unsure, check(unsure), strict=True):
                effects[place] = effect
        kept: list[bool] = []
        for place, effect in enumerate(effects):
            kept.append(size(effect) >= self.threshold)
            if not kept[-1]:
                last.value, last.doubt = ran[0][place], ran[1][place]
                self.found.value = last.value
            if kept[-1] != guess[place]:
                break
        return kept, effects[: len(kept)]


@dataclass
class _Last:
    """Where a receiver is on its way.

    Attributes:
        value: The metric without all edges that were removed.
        doubt: How far it may be off.
    """

    value: float
    doubt: float = 0.0


@torch.no_grad()
def effects(
    current: Current | Whole, metric: Metric, edges: Tensor, settings: Settings, *, bar: Any = None
) -> Search:
    """Remove edges of a run, each alone, and tell what that adds to the metric.

    Args:
        current: Of all edges; it stays as it is.
        metric: By which they are judged.
        edges: bool ``(S, R)``, those to remove.
        settings: Of batches.
        bar: A tqdm to tell.

    Raises:
        FloatingPointError: The metric is not finite.
        MemoryError: Not even one row fits.
    """
    graph, found = current.executor.graph, Search()
    rows = rows_of(current, metric, settings, found)
    for receiver in graph.order():
        current.close(receiver)
    rows.begin()
    for receiver in graph.order():
        candidates = [s for s in graph.candidates(receiver) if bool(edges[s, receiver])]
        removals = rows.removals(receiver) if candidates else None
        while removals is not None and candidates:
            batch = candidates[: removals.fitting()]
            names = [f"edge {graph.name(sender, receiver)}" for sender in batch]
            ran = removals.remove(batch, [False] * len(batch), names)
            if ran is None:
                continue
            for sender, value in zip(batch, ran[0], strict=True):
                found.effects[sender, receiver] = value - found.value
            found.tested += len(batch)
            candidates = candidates[len(batch) :]
            if bar is not None:
                bar.update(len(batch))
    return found


def rows_of(
    current: Current | Whole, metric: Metric, settings: Settings, found: Search
) -> Rows | WholeRows:
    """Return how removals from a run are tried."""
    if isinstance(current, Whole):
        return WholeRows(current, metric, settings, found)
    return Rows(current, metric, settings, found)
