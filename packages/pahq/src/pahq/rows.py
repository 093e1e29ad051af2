"""Many removals at once, each judged by the metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels.ops.patching import prefix_norm

from pahq.batches import Batches
from pahq.metrics import CustomMetric
from pahq.precision import PRECISIONS, Weights, behind
from pahq.recording import Recorder
from pahq.suffix import Suffix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from shared_kernels.ops.patching import Rounded
    from torch import Tensor

    from pahq.batches import Search, Settings
    from pahq.current import Current
    from pahq.metrics import Metric
    from pahq.precision import Precision


class Rows(Batches):
    """Runs removals in many rows, as many at a time as fit into memory.

    Args:
        current: What is changed.
        metric: By which rows are judged.
        settings: Of batches.
        found: Told of batches and rows.
    """

    def __init__(self, current: Current, metric: Metric, settings: Settings, found: Search) -> None:
        super().__init__(settings, found)
        self.current, self.metric = current, metric
        self.low, self.high = PRECISIONS[settings.precision], PRECISIONS["fp32"]
        self.weights = Weights(current.executor.adapter)
        # neither what a metric of one's own does nor copies from the host can be recorded
        streamer, held = current.executor.adapter.streamer, self.low.held
        copies = streamer is not None and (held is None or held.itemsize >= streamer.itemsize)
        records = current.device.type == "cuda" and not isinstance(metric.name, CustomMetric)
        records = records and not copies
        self.recorder = Recorder(current.device) if records else None
        self._trials: dict[Suffix, _Recorded] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Judge the current run: what rows are compared with."""
        current = self.current
        self.base = current.input(current.executor.graph.logits) - self.metric.clean
        values, self.each = self.metric.of(self.base[None])
        if self.low.doubt:
            self.slopes: Any = self.metric.slopes(self.base)
        self.found.value = self.value = float(self.ranks.first(values)[0])

    def removals(self, receiver: int) -> Removals:
        """Return the removals of a receiver's edges."""
        return Removals(self, receiver)

    def together(
        self, receivers: list[int], names: Sequence[str]
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric without all edges into the first receiver, into the first two, ...

        Args:
            receivers: Of a layer's heads.
            names: Of what each row removes more than the one before it.
        """
        change = self._emptied(receivers)
        on = torch.ones(len(receivers), len(receivers)).tril().to(self.base)

        def given(mine: slice) -> dict[int, Rounded]:
            rowed = {r: on[mine, i, None, None] * change[r] for i, r in enumerate(receivers)}
            return self.changes(rowed, self.high)

        return self.run(Suffix(self.current, receivers), given, names, self.high)

    def empty(self, receivers: list[int]) -> None:
        """Let the current run be without all edges into some receivers of a layer's heads."""
        change = self._emptied(receivers)
        gone = self.changes({r: change[r][None] for r in receivers}, self.high)
        suffix = Suffix(self.current, receivers)
        self.current.edges[:, receivers] = False
        self.take(suffix, gone)

    def _emptied(self, receivers: list[int]) -> dict[int, Tensor]:
        current = self.current
        return {
            r: current.corrupted_input(r, current.need(r)) - current.input(r) for r in receivers
        }

    def fitting(self, suffix: Suffix, precision: Precision) -> int:
        """Return how many rows a batch may have."""
        held = precision.held or self.current.dtype
        return max(1, min(self.most, self.budget // suffix.row_bytes(held))) * self.ranks.count

    def remove(
        self,
        suffix: Suffix,
        senders: Sequence[int],
        drop: Sequence[bool],
        start: Tensor | None,
        names: Sequence[str],
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric without some senders of a receiver: see `run`.

        Args:
            suffix: Of the receiver.
            senders: M of them: row m is without the m-th.
            drop: Whether all rows behind a sender's are without it, too.
            start: ``(tokens, D)``, what is different in all rows.
            names: Of the edges.
        """
        current, precision = self.current, self.low

        def judge(mine: slice) -> Tensor:
            here, goes, begin = senders[mine], drop[mine], start
            before = [s for s, too in zip(senders, drop[: mine.start], strict=False) if too]
            if before:
                begin = current.without(start, before, current.need(suffix.receivers[0]))
            if self.recorder is not None:
                return self._repeated(self.recorder, suffix, here, goes, begin)
            gives = current.gone(here, current.need(suffix.receivers[0]))
            goes = torch.tensor(goes, device=current.device)
            given = self._removals(suffix, gives, goes, begin, precision)
            return self._judge(suffix, given, len(here), precision)

        return self.caught(judge, names, self.base)

    def _repeated(
        self,
        recorder: Recorder,
        suffix: Suffix,
        senders: Sequence[int],
        drop: Sequence[bool],
        start: Tensor | None,
    ) -> Tensor:
        """Return what `_judge` does, recorded by the first batch of a suffix."""
        trial = self._trials.get(suffix)
        if trial is None or trial.rows < len(senders):
            # one at a time, for each holds the memory of its rows
            self.dropped()
            trial = self._trials[suffix] = _Recorded(self, recorder, suffix, len(senders))
        return trial(senders, drop, start)

    def _removals(
        self,
        suffix: Suffix,
        gives: Tensor,
        drop: Tensor,
        start: Tensor | None,
        precision: Precision,
    ) -> dict[int, Rounded]:
        """Return what a receiver reads without each of some senders, by rows.

        Args:
            suffix: Of the receiver.
            gives: ``(M, tokens, D)``, what the senders give.
            drop: bool ``(M,)``, whether all rows behind a sender's are without it, too.
            start: Of `remove`.
            precision: Of rows.
        """
        current, receiver = self.current, suffix.receivers[0]
        x = current.input(receiver)
        norm = current.norm(receiver)
        kind, weight, eps = ("none", None, 0.0) if norm is None else norm.scaling(x)
        every = torch.arange(len(gives), device=x.device)
        dtype = self._dtype(receiver, precision)
        return {receiver: prefix_norm(
            x, gives, every, drop, start, weight=weight, kind=kind, eps=eps, dtype=dtype
        )}  # fmt: skip

    def changes(self, changes: dict[int, Tensor], precision: Precision) -> dict[int, Rounded]:
        """Return what receivers read if something is added to it.

        Args:
            changes: By receiver, ``(M, tokens, D)``.
            precision: Of what is behind.
        """
        current = self.current
        return {
            receiver: behind(
                current.norm(receiver), current.input(receiver), change,
                self._dtype(receiver, precision),
            )
            for receiver, change in changes.items()
        }  # fmt: skip

    def _dtype(self, receiver: int, precision: Precision) -> torch.dtype:
        layer, part, _ = self.current.executor.graph.place(receiver)
        if part != "mlp" or precision.multiplied is None:
            # the head in question is in high precision (arXiv:2510.23264)
            return self.current.dtype
        return self.weights.operand("mlp", layer, precision.multiplied)

    def run(
        self,
        suffix: Suffix,
        given: Callable[[slice], dict[int, Rounded]],
        names: Sequence[str],
        precision: Precision,
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric of rows and how far it may be off; None where fewer rows will fit.

        Args:
            suffix: Behind what is given.
            given: What receivers read, of some rows.
            names: Of what rows remove, for an error.
            precision: Of rows.

        Raises:
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one row fits.
        """  # fmt: skip

        def judge(mine: slice) -> Tensor:
            return self._judge(suffix, given(mine), mine.stop - mine.start, precision)

        return self.caught(judge, names, self.base)

    def _judge(
        self, suffix: Suffix, given: dict[int, Rounded], rows: int, precision: Precision
    ) -> Tensor:
        """Return the metric of rows and how far it may be off, ``(2, M)``, on the device."""
        change = suffix.run(given, rows, precision, self.weights, self.budget)
        if change is None:
            change = self.base.new_zeros(1).expand(rows, *self.base.shape)
        values, each = self.metric.of(self.base + change)
        if not precision.doubt:
            return torch.stack([values, torch.zeros_like(values)])
        return torch.stack([values, precision.doubt * self._size(values, each, change)])

    def _size(self, values: Tensor, each: Tensor | None, change: Tensor) -> Tensor:
        """Return how far rows are from the current run, of which rounding is a share.

        The changes of examples, or of logits, may cancel in a metric; what rounding makes of them
        does not. Half of it is what the metric of examples changes by. To that comes what changes
        of the final states would move it by in a direction drawn at random, to first order.

        Args:
            values: ``(M,)``, of rows.
            each: ``(M, N)``, of their examples, if these have a metric of their own.
            change: ``(M, N, D)``, of the final states.
        """
        if each is None or self.each is None:
            far = (values - self.value).abs()
        else:
            far = (each - self.each).abs().mean(-1)
        moved = (self.slopes * change.norm(dim=-1)).sum(-1) / change.shape[-1] ** 0.5
        return far / 2 + moved

    def freed(self) -> None:
        """Give back memory that nothing uses, and what is kept for recordings."""
        self.dropped()
        if self.recorder is None:
            super().freed()
            return
        self.recorder = None
        super().freed()
        self.recorder = Recorder(self.current.device)

    def dropped(self) -> None:
        """Forget what is recorded."""
        self._trials.clear()

    def take(self, suffix: Suffix, given: dict[int, Rounded]) -> None:
        """Let the current run be what one row is, in high precision.

        Args:
            suffix: Behind what is given.
            given: Of one row, in high precision.
        """
        self.dropped()
        changes: list[tuple[int, Tensor]] = []
        suffix.run(given, 1, self.high, self.weights, self.budget,
                   lambda sender, change: changes.append((sender, change[0].clone())))  # fmt: skip
        for sender, change in changes:
            self.current.add(sender, change)
        self.current.forget([read.receiver for read in suffix.reads] + suffix.receivers)
        self.begin()


class Removals:
    """Removals of a receiver's edges, one after the other.

    Args:
        rows: In which they are tried.
        receiver: Its edges.

    """

    def __init__(self, rows: Rows, receiver: int) -> None:
        self.rows, self.receiver = rows, receiver
        self.suffix = Suffix(rows.current, [receiver])
        self._start: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Return whether some are removed for good that the current run still has."""
        return self._start is not None

    def fitting(self) -> int:
        """Return how many rows a batch may have."""
        rows = self.rows
        most = rows.fitting(self.suffix, rows.low)
        # a GPU hardly takes longer for more rows, and repeats what is recorded with as many
        on_cpu = rows.current.device.type == "cpu"
        return min(most, rows.worth() * rows.ranks.count) if on_cpu else most

    def remove(
        self, senders: Sequence[int], drop: Sequence[bool], names: Sequence[str]
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric without some senders and how far it may be off: see `Batches.caught`.

        Args:
            senders: M of them: row m is without the m-th.
            drop: Whether all rows behind a sender's are without it, too.
            names: Of the edges.
        """
        return self.rows.remove(self.suffix, senders, drop, self._start, names)

    def again(
        self, senders: Sequence[int], drop: Sequence[bool], names: Sequence[str], places: list[int]
    ) -> list[float]:
        """Return effects of some of these removals in high precision.

        Args:
            senders: Of `remove`.
            drop: Of `remove`.
            names: Of `remove`.
            places: Of those among the senders, in their order.
        """
        rows, current = self.rows, self.rows.current
        need = current.need(self.receiver)
        before = self._start
        states: list[Tensor] = []
        for place in range(places[-1] + 1):
            gone = current.gone([senders[place]], need)[0]
            if place in places:
                before = torch.zeros_like(gone) if before is None else before
                states += [before, before - gone]
            if drop[place]:
                before = -gone if before is None else before - gone
        values: list[float] = []
        while len(values) < len(states):
            size = max(1, rows.fitting(self.suffix, rows.high))
            some = states[len(values) : len(values) + size]

            def given(mine: slice, some: list[Tensor] = some) -> dict[int, Rounded]:
                return rows.changes({self.receiver: torch.stack(some[mine])}, rows.high)

            ran = rows.run(self.suffix, given, [names[places[0]]] * len(some), rows.high)
            if ran is not None:
                values += ran[0]
        rows.found.checked += len(places)
        return [after - was for was, after in zip(values[::2], values[1::2], strict=True)]

    def drop(self, senders: list[int]) -> None:
        """Remove some for good."""
        current = self.rows.current
        current.edges[senders, self.receiver] = False
        if senders:
            self._start = current.without(self._start, senders, current.need(self.receiver))

    def take(self) -> None:
        """Let the current run be without all that is removed."""
        rows = self.rows
        if self._start is not None:
            rows.take(self.suffix, rows.changes({self.receiver: self._start[None]}, rows.high))
            self._start = None


class _Recorded:
    """Batches of a receiver's removals, recorded once.

    Args:
        rows: Of all.
        recorder: Of them.
        suffix: Of the receiver.
        count: Of rows in a batch; where there are fewer, the last is there several times.
    """

    def __init__(self, rows: Rows, recorder: Recorder, suffix: Suffix, count: int) -> None:
        current, precision = rows.current, rows.low
        suffix.prepare(precision, rows.weights)
        self.rows, self.current = count, current
        receiver = suffix.receivers[0]
        self.need = current.need(receiver)
        self.start = torch.zeros_like(current.input(receiver))
        self.gives = self.start.new_zeros(count, *self.start.shape)
        self.drop = torch.zeros(count, dtype=torch.bool, device=current.device)
        self.judge = recorder.record(
            lambda: rows._judge(
                suffix, rows._removals(suffix, self.gives, self.drop, self.start, precision), count,
                precision,
            )
        )  # fmt: skip

    def __call__(
        self, senders: Sequence[int], drop: Sequence[bool], start: Tensor | None
    ) -> Tensor:
        """Return what `Rows.run` judges by, ``(2, M)``."""
        missing = self.rows - len(senders)
        self.current.gone([*senders, *[senders[-1]] * missing], self.need, self.gives)
        self.drop.copy_(torch.tensor([*drop, *[False] * missing]), non_blocking=True)
        if start is None:
            self.start.zero_()
        else:
            self.start.copy_(start)
        return self.judge()
