"""Many removals at once, each judged by the metric."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from shared_kernels.ops.patching import prefix_norm

from pahq.current import WIDE
from pahq.metrics import CustomMetric
from pahq.precision import PRECISIONS, Weights, behind
from pahq.recording import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared_kernels.ops.patching import Rounded
    from torch import Tensor

    from pahq.current import Current
    from pahq.metrics import Metric
    from pahq.precision import Precision
    from pahq.suffix import Suffix

_LOG = logging.getLogger(__name__)


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
        checked: Edges that were tried again in high precision.
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
    checked: int = 0
    effects: dict[tuple[int, int], float] = field(default_factory=dict)
    direct: dict[int, float] = field(default_factory=dict)


@dataclass
class Settings:
    """How much is done at once, and how precisely.

    Attributes:
        rows: Of a batch at most.
        precision: One of `pahq.precision.PRECISIONS`.
        budget: Bytes that rows may take.
    """

    rows: int = 64
    precision: str = "fp32"
    budget: int = 2 << 30


def budget_of(device: torch.device) -> int:
    """Return how many bytes rows may take on a device if nothing else is said."""
    if device.type != "cuda":
        return 2 << 30
    return torch.cuda.mem_get_info(device)[0] // 2


class Rows:
    """Runs removals in many rows, as many at a time as fit into memory.

    Args:
        current: What is changed.
        metric: By which rows are judged.
        settings: Of batches.
        found: Told of batches and rows.
    """

    def __init__(self, current: Current, metric: Metric, settings: Settings, found: Search) -> None:
        self.current, self.metric, self.found = current, metric, found
        self.most, self.budget = settings.rows, settings.budget
        self.low, self.high = PRECISIONS[settings.precision], PRECISIONS["fp32"]
        self.weights = Weights(current.executor.adapter)
        # what a metric of one's own does may be nothing to be recorded
        records = current.moved.is_cuda and not isinstance(metric.name, CustomMetric)
        self.recorder = Recorder(current.moved.device) if records else None
        self._trials: dict[Suffix, _Trial] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Judge the current run: what rows are compared with."""
        current = self.current
        self.base = current.input(current.executor.graph.logits) - self.metric.clean
        values, self.each = self.metric.of(self.base[None])
        self.found.value = self.value = float(values[0])

    def fitting(self, suffix: Suffix, precision: Precision) -> int:
        """Return how many rows a batch may have."""
        held = precision.held or self.current.moved.dtype
        return max(1, min(self.most, self.budget // suffix.row_bytes(held)))

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
        precision, device = self.low, self.current.moved.device
        if self.recorder is None:
            picked = torch.tensor([senders, drop], device=device)
            return self._caught(
                lambda: self._judge(
                    suffix, self._removals(suffix, picked, start, precision), len(names), precision
                ),
                names,
            )
        recorder = self.recorder
        return self._caught(lambda: self._recorded(recorder, suffix, senders, drop, start), names)

    def _recorded(
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
            self._trials.clear()
            trial = self._trials[suffix] = _Trial(self, recorder, suffix, len(senders))
        return trial(senders, drop, start)

    def _removals(
        self, suffix: Suffix, picked: Tensor, start: Tensor | None, precision: Precision
    ) -> dict[int, Rounded]:
        """Return what a receiver reads without some senders, by rows; picked is ``(2, M)``."""
        current, receiver = self.current, suffix.receivers[0]
        x = current.input(receiver)
        norm = current.norm(receiver)
        kind, weight, eps = ("none", None, 0.0) if norm is None else norm.scaling(x)
        return {receiver: prefix_norm(
            x, current.moved, picked[0], picked[1].bool(), start,
            at=None if current.need(receiver) == WIDE else current.at,
            weight=weight, kind=kind, eps=eps, dtype=self._dtype(receiver, precision),
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
            return self.current.moved.dtype
        return self.weights.operand("mlp", layer, precision.multiplied)

    def run(
        self,
        suffix: Suffix,
        given: Callable[[], dict[int, Rounded]],
        names: Sequence[str],
        precision: Precision,
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric of rows and how far it may be off; None where fewer rows will fit.

        Args:
            suffix: Behind what is given.
            given: What receivers read, by rows.
            names: Of what rows remove, for an error.
            precision: Of rows.

        Raises:
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one row fits.
        """  # fmt: skip
        return self._caught(lambda: self._judge(suffix, given(), len(names), precision), names)

    def _judge(
        self, suffix: Suffix, given: dict[int, Rounded], rows: int, precision: Precision
    ) -> Tensor:
        """Return the metric of rows and how far it may be off, ``(2, M)``, on the device."""
        change = suffix.run(given, rows, precision, self.weights, self.budget)
        if change is None:
            change = self.base.new_zeros(1).expand(rows, *self.base.shape)
        values, each = self.metric.of(self.base + change)
        # changes of examples may cancel in their mean, but not what rounding makes of them
        if each is None or self.each is None:
            far = (values - self.value).abs()
        else:
            far = (each - self.each).abs().mean(-1)
        return torch.stack([values, precision.doubt * far])

    def _caught(
        self, judge: Callable[[], Tensor], names: Sequence[str]
    ) -> tuple[list[float], list[float]] | None:
        count = len(names)
        try:
            values, doubt = judge()[:, :count].tolist()
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise MemoryError(
                    "one row does not fit into memory; give fewer or shorter examples"
                ) from error
            self.most = count // 2
            _LOG.warning("out of memory with %d rows: goes on with %d rows", count, self.most)
            self._trials.clear()
            torch.cuda.empty_cache()
            return None
        for value, name in zip(values, names, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"metric: {value} without {name}")
        self.found.batches += 1
        self.found.rows += count
        return values, doubt

    def take(self, suffix: Suffix, given: dict[int, Rounded]) -> None:
        """Let the current run be what one row is, in high precision.

        Args:
            suffix: Behind what is given.
            given: Of one row, in high precision.
        """
        self._trials.clear()
        changes: list[tuple[int, Tensor]] = []
        suffix.run(given, 1, self.high, self.weights, self.budget,
                   lambda sender, change: changes.append((sender, change[0].clone())))  # fmt: skip
        for sender, change in changes:
            self.current.add(sender, change)
        self.current.forget([read.receiver for read in suffix.reads] + suffix.receivers)
        self.begin()


class _Trial:
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
        self.rows = count
        self.picked = torch.zeros(2, count, dtype=torch.int64, device=current.moved.device)
        self.start = torch.zeros_like(current.input(suffix.receivers[0]))
        self.judge = recorder.record(
            lambda: rows._judge(
                suffix, rows._removals(suffix, self.picked, self.start, precision), count, precision
            )
        )

    def __call__(
        self, senders: Sequence[int], drop: Sequence[bool], start: Tensor | None
    ) -> Tensor:
        """Return what `Rows.run` judges by, ``(2, M)``."""
        missing = self.rows - len(senders)
        picked = [[*senders, *[senders[-1]] * missing], [*drop, *[False] * missing]]
        self.picked.copy_(torch.tensor(picked), non_blocking=True)
        if start is None:
            self.start.zero_()
        else:
            self.start.copy_(start)
        return self.judge()
