"""Removals tried in whole runs: of everything behind a receiver, not only of what changes.

For models in which a head changes what the others of its layer write, and for roundings of
activations, which no difference from another run can show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pahq.batches import Batches
from pahq.forward import State
from pahq.rounding import RoundedExecutor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pahq.batches import Search, Settings
    from pahq.forward import Executor, PlainRun
    from pahq.metrics import Metric


class Whole:
    """What senders compute in a circuit that is being decided, from the last receiver to the first.

    Args:
        executor: Of the model.
        clean: Its run on clean inputs; its senders are taken over and changed.
        corrupted: Of inputs of the same shape; its senders may be on another device.

    Attributes:
        present: bool ``(S, R)`` on the CPU; all edges at first.
        moved: ``(S, N, T, D)``, outputs of senders in the clean run less those of the corrupted
            one. Senders before the receiver in question have no others; all behind it are computed
            in every row.
        needs: bool ``(S,)``, whether decided receivers read a sender.
        final: ``(N, T, D)``, what the logits are made of.
    """

    def __init__(self, executor: Executor, clean: PlainRun, corrupted: PlainRun) -> None:
        graph = executor.graph
        self.executor, self.corrupted, self.final = executor, corrupted, clean.final
        self.present = torch.from_numpy(graph.full())
        self.edges = self.present.numpy()
        self.moved = clean.senders
        for sender in range(graph.senders):
            self.moved[sender] -= corrupted.senders[sender].to(self.moved.device)
        self.needs = np.zeros(graph.senders, bool)

    def need(self, receiver: int) -> int:
        """Return whether what a receiver reads counts, 0 or 1."""
        graph = self.executor.graph
        layer, part, _ = graph.place(receiver)
        if part == "logits":
            return 1
        readers = graph.readers(receiver)
        if part != "mlp" and self.executor.adapter.shared_scale:
            readers = list(range(graph.head(layer, 0), graph.mlp(layer)))
        return int(self.needs[readers].any())

    def close(self, receiver: int) -> None:
        """Take a receiver as decided: what it reads of its senders counts."""
        if self.need(receiver):
            self.needs |= self.edges[:, receiver]

    def reset(self) -> None:
        """Take all receivers as undecided."""
        self.needs[:] = False

    @torch.no_grad()
    def compute(self, first: int) -> None:
        """Compute what the logits are made of anew, from a layer on that is decided."""
        if isinstance(self.executor, RoundedExecutor):
            self.executor.precise = None
        known = self.moved[: self.executor.graph.head(first, 0)]
        self.final = State(self.executor, self.present, self.corrupted, known).final

    def row_bytes(self, receiver: int) -> int:
        """Return the bytes of a row, of all that is held at once."""
        graph, adapter = self.executor.graph, self.executor.adapter
        made = graph.senders - graph.upstream(receiver)
        state = self.moved[0].nbytes
        inside = 0
        if made:
            block = adapter.feed_forward(graph.layers - 1)
            inside = 3 * len(block.inner) * state // self.moved.shape[-1]
        # what heads of a kind read, before and behind their norm, is there at the same time
        return state * (made + 3 * max(graph.heads, 2)) + inside


class WholeRows(Batches):
    """Runs removals in many rows, as many at a time as fit into memory.

    Args:
        current: What is changed.
        metric: By which rows are judged.
        settings: Of batches.
        found: Told of batches and rows.
    """

    def __init__(self, current: Whole, metric: Metric, settings: Settings, found: Search) -> None:
        super().__init__(settings, found)
        self.current, self.metric = current, metric

    @torch.no_grad()
    def begin(self) -> None:
        """Judge the current run."""
        value = self.metric(self.current.final[None])
        self.found.value = float(self.ranks.first(value)[0])

    def removals(self, receiver: int) -> WholeRemovals:
        """Return the removals of a receiver's edges."""
        return WholeRemovals(self, receiver)

    def together(
        self, receivers: list[int], names: Sequence[str]
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric without all edges into the first receiver, into the first two, ...

        Args:
            receivers: Of a layer's heads.
            names: Of what each row removes more than the one before it.
        """
        current = self.current
        up = current.executor.graph.upstream(receivers[0])
        # none of their edges is decided yet
        whole = current.moved[:up].sum(0)
        on = torch.ones(len(receivers), len(receivers)).tril().to(whole)
        changes = {r: -on[:, i, None, None, None] * whole for i, r in enumerate(receivers)}
        return self.run(up, changes, names)

    def empty(self, receivers: list[int]) -> None:
        """Let the current run be without all edges into some receivers of a layer's heads."""
        current = self.current
        current.edges[:, receivers] = False
        current.compute(current.executor.graph.place(receivers[0])[0])
        self.begin()

    def run(
        self, known: int, changes: dict[int, Tensor], names: Sequence[str]
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric of rows, and that it is not off: see `Batches.caught`.

        Args:
            known: How many senders, from the first on, are as in the current run.
            changes: Of `State`.
            names: Of what rows remove.
        """
        current = self.current

        def judge(mine: slice) -> Tensor:
            some = {receiver: change[mine] for receiver, change in changes.items()}
            state = State(
                current.executor, current.present, current.corrupted, current.moved[:known], some
            )
            values = self.metric(state.finals)
            return torch.stack([values, torch.zeros_like(values)])

        return self.caught(judge, names, self.metric.clean)


class WholeRemovals:
    """Removals of a receiver's edges, one after the other.

    Args:
        rows: In which they are tried.
        receiver: Its edges; a rounding leaves the head that it belongs to in high precision.
    """

    def __init__(self, rows: WholeRows, receiver: int) -> None:
        self.rows, self.receiver = rows, receiver
        executor = rows.current.executor
        if isinstance(executor, RoundedExecutor):
            executor.focus(receiver)
            nothing = torch.zeros_like(rows.current.moved[0])[None]
            ran = rows.run(self._known, {receiver: nothing}, ["any edge"])
            if ran is not None:
                rows.found.value = ran[0][0]

    @property
    def _known(self) -> int:
        return self.rows.current.executor.graph.upstream(self.receiver)

    def fitting(self) -> int:
        """Return how many rows a batch may have."""
        rows = self.rows
        most = max(1, min(rows.most, rows.budget // rows.current.row_bytes(self.receiver)))
        on_cpu = rows.current.moved.device.type == "cpu"
        return min(most, rows.worth() if on_cpu else most) * rows.ranks.count

    def remove(
        self, senders: Sequence[int], drop: Sequence[bool], names: Sequence[str]
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric without some senders: see `Batches.caught`.

        Args:
            senders: M of them: row m is without the m-th.
            drop: Whether all rows behind a sender's are without it, too.
            names: Of the edges.
        """
        gone = self.rows.current.moved[list(senders)]
        dropped = gone * torch.tensor(drop, device=gone.device)[:, None, None, None]
        change = dropped - dropped.cumsum(0) - gone
        return self.rows.run(self._known, {self.receiver: change}, names)

    def drop(self, senders: list[int]) -> None:
        """Remove some for good."""
        self.rows.current.edges[senders, self.receiver] = False
