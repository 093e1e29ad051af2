"""Whether a circuit does what the model does, its complement does not, and chance does neither."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message

from pahq.circuit import Circuit
from pahq.evaluation.runs import Judge, Runs, Score, check_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from pahq.finder import CircuitFinder
    from pahq.graph import Graph
    from pahq.tasks import Task

_COLUMNS = {"kl": "KL / nats", "recovered": "recovered", "agreement": "top-1 agreement"}


@dataclass(frozen=True)
class TaskReport:
    """Scores on the pairs of one task.

    Attributes:
        name: Of the task.
        pairs: N.
        circuit: Score of the circuit.
        complement: Of all edges that it does not have.
        none: Of no edge.
        random: Of each random circuit.
    """

    name: str | None
    pairs: int
    circuit: Score
    complement: Score
    none: Score
    random: tuple[Score, ...]

    def spread(self, field: str) -> tuple[float, float, float] | None:
        """Return the lowest, median and highest value of random circuits; None if they have none.

        Args:
            field: Of `Score`.
        """
        values = [getattr(score, field) for score in self.random]
        if None in values:
            return None
        return min(values), statistics.median(values), max(values)


@dataclass(frozen=True)
class Faithfulness:
    """What a circuit recovers, against random circuits of its size and its complement.

    Attributes:
        edges: Of the circuit, and of each random one.
        total: Edges of the model.
        ablation: What absent edges carried.
        seed: Of the random circuits.
        task: Scores on the task.
        held_out: On pairs that were held out; None if there were none.
    """

    edges: int
    total: int
    ablation: str
    seed: int
    task: TaskReport
    held_out: TaskReport | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        drawn = len(self.task.random)
        lines = [
            f"{self.edges:,} of {self.total:,} edges; absent ones: {self.ablation}. Random: "
            f"{drawn} circuits of as many edges, each drawn uniformly from all edges (seed "
            f"{self.seed}), median (lowest to highest).",
        ]
        for title, report in (("task", self.task), ("held-out pairs", self.held_out)):
            if report is None:
                continue
            lines += ["", f"{title}: {report.name or 'unnamed'}, {report.pairs} pairs", ""]
            lines += [f"| | {' | '.join(_COLUMNS.values())} |", "|---" * 4 + "|"]
            for row, score in (
                ("circuit", report.circuit), ("complement", report.complement),
                ("no edge", report.none),
            ):  # fmt: skip
                cells = [_number(getattr(score, field)) for field in _COLUMNS]
                lines.append(f"| {row} | {' | '.join(cells)} |")
            cells = [_range(report.spread(field)) for field in _COLUMNS]
            lines.append(f"| random | {' | '.join(cells)} |")
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _range(spread: tuple[float, float, float] | None) -> str:
    if spread is None:
        return "-"
    low, middle, high = map(_number, spread)
    return f"{middle} ({low} to {high})"


def faithfulness(
    finder: CircuitFinder,
    circuit: Circuit,
    task: Task,
    *,
    held_out: Task | None = None,
    random_circuits: int = 20,
    seed: int = 0,
    ablation: str = "patch",
    progress: bool = True,
) -> Faithfulness:
    """Judge a circuit on the pairs it was found on and on others, against chance.

    Random circuits have as many edges as the circuit, drawn uniformly from all edges without regard
    to whether they reach the logits: most small ones recover nothing. The same ones are run on both
    tasks. The plain runs on clean and corrupted inputs are made once for all circuits.

    Args:
        finder: Of the model.
        circuit: Of that model.
        task: Pairs that it was found on.
        held_out: Pairs that it was not found on.
        random_circuits: How many; fewer than 20 say little of the extremes.
        seed: Of the random circuits.
        ablation: What absent edges carry, one of `pahq.ABLATIONS`.
        progress: Whether to show a bar.

    Raises:
        ValueError: A circuit of another model, no random circuits, another ablation, or held-out
            pairs that are those of the task.
    """
    from tqdm.auto import tqdm

    check_range("random_circuits", random_circuits, 1, 1 << 20, "chance wants a circuit to show it")
    if held_out is not None and held_out.fingerprint == task.fingerprint:
        remedy = "draw some with another seed"
        raise ValueError(message("held_out", "other pairs than the task's", "the same", remedy))
    graph = finder.graph
    check_graph("circuit", circuit, graph)
    full = torch.from_numpy(graph.full())
    draws = torch.Generator().manual_seed(seed)
    chance = [_drawn(graph, len(circuit), draws) for _ in range(random_circuits)]
    complement = Circuit(graph, full & ~circuit.present, circuit.scores)
    tasks = [task] if held_out is None else [task, held_out]
    count = len(tasks) * (random_circuits + 2)
    with tqdm(total=count, desc="faithfulness", unit="circuit", disable=not progress) as bar:
        reports = [
            _report(finder, one, ablation, circuit, complement, chance, bar.update) for one in tasks
        ]
    return Faithfulness(
        len(circuit), graph.edges, ablation, seed, reports[0],
        None if held_out is None else reports[1],
    )  # fmt: skip


def _drawn(graph: Graph, count: int, draws: torch.Generator) -> Circuit:
    full = torch.from_numpy(graph.full())
    edges = full.nonzero()[torch.randperm(graph.edges, generator=draws)[:count]]
    present = torch.zeros_like(full)
    present[edges[:, 0], edges[:, 1]] = True
    return Circuit(graph, present, torch.full(full.shape, float("nan")))


def _report(
    finder: CircuitFinder,
    task: Task,
    ablation: str,
    circuit: Circuit,
    complement: Circuit,
    chance: list[Circuit],
    done: Callable[[], Any],
) -> TaskReport:
    runs = Runs(finder, task, ablation)
    judge = Judge(runs)

    def score(one: Circuit) -> Score:
        found = judge(runs.final(one))
        done()
        return found

    return TaskReport(
        task.meta.get("name"), len(task), score(circuit), score(complement), judge(runs.none),
        tuple(map(score, chance)),
    )  # fmt: skip
