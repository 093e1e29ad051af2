"""How well edges are told from those of a circuit that is known."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import check_choice, message

from pahq.circuit import Circuit
from pahq.evaluation.runs import check_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES = ("pessimistic", "trapezoid")


@dataclass(frozen=True)
class Roc:
    """True and false positives, from no edge to all.

    Edges are those of `pahq.Graph`: additions to the residual stream, no direct edges from a head's
    input to its query, key and value, which ACDC's code counts too.

    Attributes:
        mode: How points are joined: ``pessimistic`` or ``trapezoid``.
        fpr: Share of the edges outside the true circuit that were taken, ascending.
        tpr: Share of those of it that were.
        positives: Edges of the true circuit.
        negatives: All others.
        area: Under the curve.
    """

    mode: str
    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    positives: int
    negatives: int
    area: float

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"AUC {self.area:.4f} ({self.mode}, {len(self.fpr)} points; {self.positives:,} of "
            f"{self.positives + self.negatives:,} edges are true, direct edges not counted)"
        )


def auc_roc(
    found: Circuit | Sequence[Circuit],
    truth: Circuit,
    *,
    mode: str = "pessimistic",
    absolute: bool = True,
) -> Roc:
    """Compare circuits with the true one, as Conmy et al. do (arXiv:2304.14997).

    Each circuit is a point, as are no edge and all edges. Points with more false and fewer true
    edges than another are left out. ``pessimistic`` joins the others by steps, first to the right
    and then up, for nothing is known of circuits between two; ``trapezoid`` by straight lines.

    For scores, ``trapezoid`` is the probability that a true edge has a higher score than another,
    equal scores counted half; ``pessimistic`` does not count them at all.

    Args:
        found: Circuits, such as those of several thresholds; or one with scores, each of which is
            a threshold. Edges that it does not have, and those without a score, rank last.
        truth: Some of the edges of that model, not all.
        mode: ``pessimistic`` or ``trapezoid``.
        absolute: Whether a score below 0 counts like one above it, as in `Circuit.top`.

    Raises:
        ValueError: Another mode, no circuit, one of another model, or a truth without edges or
            with all.
    """
    check_choice("mode", mode, MODES)
    circuits = [found] if isinstance(found, Circuit) else list(found)
    if not circuits:
        raise ValueError(message("found", "a circuit or more", 0, "give those of some thresholds"))
    for circuit in circuits:
        check_graph("found", circuit, truth.graph)
    full = torch.from_numpy(truth.graph.full())
    true = truth.present[full].numpy()
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        remedy = "nothing is to be told apart"
        raise ValueError(message("truth", "some of all edges", f"{positives} edges", remedy))
    if isinstance(found, Circuit):
        counts = _thresholds(found, full, true, absolute)
    else:
        taken = [circuit.present[full].numpy() for circuit in circuits]
        counts = [(int((t & ~true).sum()), int((t & true).sum())) for t in taken]
    points = _frontier({*counts, (0, 0), (negatives, positives)})
    fpr = tuple(false / negatives for false, _ in points)
    tpr = tuple(right / positives for _, right in points)
    steps = zip(itertools.pairwise(fpr), itertools.pairwise(tpr), strict=True)
    area = sum(
        (b - a) * (low if mode == "pessimistic" else (low + high) / 2)
        for (a, b), (low, high) in steps
    )
    return Roc(mode, fpr, tpr, positives, negatives, area)


def _thresholds(
    circuit: Circuit, full: torch.Tensor, true: np.ndarray, absolute: bool
) -> list[tuple[int, int]]:
    """Return how many false and true edges have a score of at least each one that there is."""
    rank = circuit.scores.abs() if absolute else circuit.scores
    ranked = (circuit.present & ~circuit.scores.isnan())[full].numpy()
    rank = rank[full].double().numpy()[ranked]
    order = np.argsort(-rank, kind="stable")
    right = np.cumsum(true[ranked][order])
    last = np.append(np.diff(rank[order]) != 0, True)[: len(rank)]
    return [
        (int(n - r), int(r)) for n, r in zip(np.flatnonzero(last) + 1, right[last], strict=True)
    ]


def _frontier(points: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return in order the points to which no other has fewer false and more true edges."""
    kept: list[tuple[int, int]] = []
    best = -1
    for _, group in itertools.groupby(sorted(points), key=lambda point: point[0]):
        column = [*group]
        kept += [point for point in column if point[1] >= best]
        best = max(best, column[-1][1])
    return kept
