"""What circuits of growing size recover: CPR and CMD of the benchmark MIB.

The measures are those of Mueller et al. (arXiv:2504.13151), computed as the code of its circuit
track does: sizes are shares of all edges, the number of edges is rounded down, the area is taken by
the trapezoid rule between the smallest and the largest of these sizes. A circuit that recovers all
at each of the default sizes thus has a CPR of 0.999.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

from pahq.circuit import Circuit
from pahq.evaluation.runs import Runs, check_graph
from pahq.metrics import spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pahq.finder import CircuitFinder
    from pahq.tasks import Task

#: Sizes of circuits in MIB, in percent of all edges.
SIZES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True)
class SizeCurve:
    """What circuits of growing size recover.

    Attributes:
        metric: One of `pahq.METRICS`.
        absolute: Whether edges were ranked by absolute scores; None if a circuit was given for
            each size.
        sizes: In percent of all edges.
        edges: How many each circuit has.
        recovered: Of each, ``(m(C) - m(none)) / (m(all) - m(none))``.
        whole: The metric of all edges.
        none: Of no edge.
    """

    metric: str
    absolute: bool | None
    sizes: tuple[float, ...]
    edges: tuple[int, ...]
    recovered: tuple[float, ...]
    whole: float
    none: float

    @property
    def cpr(self) -> float:
        """Return the area under the curve, sizes as shares: high for edges that do the work."""
        return self._area(self.recovered)

    @property
    def cmd(self) -> float:
        """Return the area between the curve and 1: low for circuits that do what the model does."""
        return self._area([abs(1 - f) for f in self.recovered])

    def _area(self, heights: Sequence[float]) -> float:
        shares = [size / 100 for size in self.sizes]
        return sum(
            (b - a) * (f + g) / 2
            for (a, b), (f, g) in zip(
                itertools.pairwise(shares), itertools.pairwise(heights), strict=True
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and both areas, for JSON."""
        return asdict(self) | {"cpr": self.cpr, "cmd": self.cmd}

    def __str__(self) -> str:
        lines = [f"CPR {self.cpr:.4f}, CMD {self.cmd:.4f} ({self.metric})", ""]
        lines += ["| % of edges | edges | recovered |", "|---:|---:|---:|"]
        lines += [
            f"| {size:g} | {edges:,} | {f:.4f} |"
            for size, edges, f in zip(self.sizes, self.edges, self.recovered, strict=True)
        ]
        return "\n".join(lines)


def cpr_cmd(
    finder: CircuitFinder,
    circuit: Circuit | Sequence[Circuit],
    task: Task,
    *,
    metric: str = "logit_diff",
    sizes: Sequence[float] = SIZES,
    absolute: bool = True,
    ablation: str = "patch",
    progress: bool = True,
) -> SizeCurve:
    """Measure circuits of growing size: CPR and CMD of MIB (arXiv:2504.13151).

    Edges without a way to the logits or from the input count in a size. MIB drops them after it
    has taken the edges with the highest scores, which changes what no circuit does (``patch``).

    Args:
        finder: Of the model.
        circuit: One all of whose edges have scores, of which `Circuit.top` takes as many as a size
            has; or a circuit for each size, that of 100 % may be left out: it is all edges.
        task: Pairs to judge on, best ones that scores were not found on.
        metric: One of `pahq.METRICS`; MIB takes ``logit_diff``.
        sizes: In percent of all edges, ascending.
        absolute: Whether edges are ranked by absolute scores. MIB's tables take CPR from the
            ranking by signed scores and CMD from the one by absolute scores, where both are there.
        ablation: What absent edges carry, one of `pahq.ABLATIONS`.
        progress: Whether to show a bar.

    Raises:
        ValueError: Fewer than two sizes, or some not ascending or out of range; fewer scores than
            the largest size wants; another number of circuits; a circuit of another model; or a
            task on which all edges and none give the same.
    """
    from tqdm.auto import tqdm

    sizes = tuple(float(size) for size in sizes)
    ascending = all(a < b for a, b in itertools.pairwise(sizes))
    if len(sizes) < 2 or not ascending or not 0 < sizes[0] <= sizes[-1] <= 100:
        remedy = "they are percents of all edges"
        raise ValueError(message("sizes", "two or more, ascending, in (0, 100]", sizes, remedy))
    graph = finder.graph
    for one in [circuit] if isinstance(circuit, Circuit) else circuit:
        check_graph("circuit", one, graph)
    if isinstance(circuit, Circuit):
        counts = [int(size / 100 * graph.edges) for size in sizes]
        chosen = [circuit.top(count, absolute=absolute) for count in counts]
    else:
        chosen = list(circuit)
        if len(chosen) == len(sizes) - 1 and sizes[-1] == 100:
            full = torch.from_numpy(graph.full())
            chosen.append(Circuit(graph, full, torch.full(full.shape, float("nan"))))
        if len(chosen) != len(sizes):
            remedy = "give one for each size"
            raise ValueError(message("circuit", f"{len(sizes)} circuits", len(chosen), remedy))
    runs = Runs(finder, task, ablation)
    with torch.no_grad():
        measure = runs.metric(metric)
        whole, none = measure(torch.stack([runs.all, runs.none])).tolist()
        if not spread(whole, none, finder.adapter.dtype):
            remedy = "choose pairs that the model tells apart"
            raise ValueError(message("task", "a metric that the edges change", whole, remedy))
        values = [
            float(measure(runs.final(one)[None])[0])
            for one in tqdm(chosen, desc="sizes", unit="circuit", disable=not progress)
        ]
    return SizeCurve(
        metric, absolute if isinstance(circuit, Circuit) else None, sizes,
        tuple(map(len, chosen)), tuple((value - none) / (whole - none) for value in values),
        whole, none,
    )  # fmt: skip
