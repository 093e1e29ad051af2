"""Runs of many circuits on one task, with what they share computed once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_choice, message

from pahq.ablation import ABLATIONS, ablated
from pahq.metrics import Metric, spread

if TYPE_CHECKING:
    from torch import Tensor

    from pahq.circuit import Circuit
    from pahq.finder import CircuitFinder
    from pahq.graph import Graph
    from pahq.tasks import Task


@dataclass(frozen=True)
class Score:
    """How close a circuit comes to the whole model.

    Attributes:
        kl: Mean KL divergence of its next-token distribution from the model's, nats.
        recovered: Of the difference of logits, ``(m(C) - m(none)) / (m(all) - m(none))``; None
            without wrong answers, or if the model tells clean and corrupted prompts not apart.
        agreement: Share of prompts whose likeliest next token is the model's.
    """

    kl: float
    recovered: float | None
    agreement: float

    def to_dict(self) -> dict[str, float | None]:
        """Return all fields."""
        return asdict(self)


def check_graph(name: str, circuit: Circuit, graph: Graph) -> None:
    """Check that a circuit is of the model whose edges these are.

    Raises:
        ValueError: It is of another.
    """
    if circuit.graph != graph:
        remedy = "was it found with another model, or with another kv?"
        raise ValueError(message(name, f"edges of {graph}", circuit.graph, remedy))


class Runs:
    """The plain runs of a task, made once, and what circuits are compared with.

    Args:
        finder: Of the model.
        task: N pairs.
        ablation: What absent edges carry, one of `pahq.ABLATIONS`.

    Attributes:
        all: ``(N, T, D)``, final states of the whole model on the clean input.
        none: ``(N, T, D)``, those of no edge.

    Raises:
        ValueError: Another ablation.
    """

    @torch.no_grad()
    def __init__(self, finder: CircuitFinder, task: Task, ablation: str = "patch") -> None:
        check_choice("ablation", ablation, ABLATIONS)
        self.finder, self.task = finder, task
        executor, device = finder.executor, finder.adapter.device
        self._clean = task.clean.to(device)
        plain = executor.plain(task.corrupted.to(device))
        self._base = ablated(executor, plain, ablation, task.positions)
        self.all, self.none = executor.plain(self._clean).final, self._base.final

    @torch.no_grad()
    def final(self, circuit: Circuit) -> Tensor:
        """Return final states ``(N, T, D)`` of a circuit of this model."""
        return self.finder.executor.run(circuit.present, self._clean, self._base).final

    @torch.no_grad()
    def metric(self, name: str) -> Metric:
        """Return a metric of this task, one of `pahq.METRICS`."""
        return Metric(name, self.finder.adapter, self.task, self.all)


class Judge:
    """Scores final states.

    Args:
        runs: Of a task.
    """

    @torch.no_grad()
    def __init__(self, runs: Runs) -> None:
        self._logits = runs.finder.adapter.logits
        self._kl, self._gap = runs.metric("kl"), None
        self._first = self._logits(self._kl.clean).argmax(-1)
        if runs.task.wrong_answers is not None:
            self._gap = runs.metric("logit_diff")
            self._none, whole = self._gap(torch.stack([runs.none, runs.all])).tolist()
            self._spread = spread(whole, self._none, runs.finder.adapter.dtype)

    @torch.no_grad()
    def __call__(self, final: Tensor) -> Score:
        """Return how close final states ``(N, T, D)`` come to the model's."""
        recovered = None
        if self._gap is not None and self._spread:
            recovered = (float(self._gap(final[None])[0]) - self._none) / self._spread
        first = self._logits(final[self._kl.rows, self._kl.at]).argmax(-1)
        agreement = float((first == self._first).double().mean())
        return Score(float(self._kl(final[None])[0]), recovered, agreement)
