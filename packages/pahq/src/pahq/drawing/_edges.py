"""What all pictures have in common: edges in order of strength, widths, colours, names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from shared_kernels.bench.plot import PALETTE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pahq.circuit import Circuit

#: Colours of what an edge goes into: Okabe and Ito's, and grey for MLPs and logits.
COLOURS = {"q": PALETTE[0], "k": PALETTE[1], "v": PALETTE[2], "other": "#7a7a7a"}

_THINNEST, _THICKEST, _UNTESTED = 0.7, 5.0, 1.4


class Edge(NamedTuple):
    """An edge of a circuit.

    Attributes:
        name: As `Graph.name`.
        sender: Number.
        receiver: Number.
        kind: A key of ``COLOURS``.
        score: NaN if it has none.
    """

    name: str
    sender: int
    receiver: int
    kind: str
    score: float

    @property
    def label(self) -> str:
        """Name and score."""
        score = "not tested" if math.isnan(self.score) else f"{self.score:+.4g}"
        return f"{self.name}: {score}"


def edges_of(circuit: Circuit) -> list[Edge]:
    """Return the present edges, the strongest last, those without a score first."""
    graph, found = circuit.graph, []
    for sender, receiver in circuit.present.nonzero().tolist():
        part = graph.place(receiver)[1]
        kind = part if part in COLOURS else "other"
        score = float(circuit.scores[sender, receiver])
        found.append(Edge(graph.name(sender, receiver), sender, receiver, kind, score))
    return sorted(found, key=lambda edge: -1.0 if math.isnan(edge.score) else abs(edge.score))


def largest(edges: Sequence[Edge]) -> float:
    """Return the largest finite absolute score; 0 if there is none."""
    return max((abs(edge.score) for edge in edges if math.isfinite(edge.score)), default=0.0)


def width(score: float, top: float) -> float:
    """Return the width of a line: with the root of the share, so that weak edges differ, too."""
    if math.isnan(score):
        return _UNTESTED
    if not top:
        return _THINNEST
    return _THINNEST + (_THICKEST - _THINNEST) * math.sqrt(min(1.0, abs(score) / top))


def dashes(score: float) -> str | None:
    """Return the pattern of a line: none for a score from 0 on."""
    if math.isnan(score):
        return "1 3"
    return "6 3" if score < 0 else None


def node_of(receiver: str) -> str:
    """Return the node of a receiver, ``a3.h2`` for ``a3.h2<q>``."""
    return receiver.split("<", 1)[0]


def used(circuit: Circuit, edges: Sequence[Edge]) -> set[str]:
    """Return the names of the nodes that some present edge leaves or enters."""
    graph = circuit.graph
    names = {graph.sender_names[edge.sender] for edge in edges}
    return names | {node_of(graph.receiver_names[edge.receiver]) for edge in edges}


def caption(circuit: Circuit) -> str:
    """Return a line on how many edges there are, and how they were found."""
    known: dict[str, Any] = circuit.provenance
    parts = [f"{len(circuit):,} of {circuit.graph.edges:,} edges"]
    parts += [str(known[key]) for key in ("model", "task", "method", "metric") if known.get(key)]
    if known.get("threshold") is not None:
        parts.append(f"threshold {known['threshold']}")
    return ", ".join(parts)
