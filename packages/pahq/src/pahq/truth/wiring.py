"""Which sets of edges can be a circuit every edge of which matters."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from shared_kernels._checks import check_range, message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pahq.graph import Graph

#: Share of the inputs of keys that `wire` gives senders, and of queries where keys have some.
_CONTENT = 2 / 3


def sources_of(graph: Graph, edges: Iterable[str]) -> dict[int, list[int]]:
    """Return the senders of each receiver, after a check that no edge of them is idle.

    Args:
        graph: All edges that there are.
        edges: Names of those of the circuit.

    Returns:
        By receiver, its senders in ascending order; receivers without any are left out.

    Raises:
        ValueError: No edges, one that there is not, or one that could not matter: its sender has
            no input (for a head: of values), nothing reads its receiver, or it changes queries
            where all keys are alike.
    """
    found: dict[int, set[int]] = {}
    for name in edges:
        sender, receiver = graph.edge(name)
        found.setdefault(receiver, set()).add(sender)
    if graph.logits not in found:
        raise ValueError(
            message("edges", "some that reach the logits", len(found), "no other can matter")
        )
    read = set().union(*found.values())
    for receiver, senders in found.items():
        for sender in senders - {0}:
            needed = _needed(graph, sender)
            if needed not in found:
                _refuse(graph, sender, receiver, f"no edge into {graph.receiver_names[needed]}")
        layer, part, index = graph.place(receiver)
        if part == "logits":
            continue
        if not read & set(graph.readers(receiver)):
            _refuse(
                graph, min(senders), receiver, f"nothing reads {graph.receiver_names[receiver]}"
            )
        keys = graph.columns(layer, "k").start + index // graph.group
        if part == "q" and keys not in found:
            _refuse(graph, min(senders), receiver, f"no edge into {graph.receiver_names[keys]}")
        if part == "k" and graph.columns(layer, "v").start + index not in found:
            values = graph.receiver_names[graph.columns(layer, "v").start + index]
            _refuse(graph, min(senders), receiver, f"no edge into {values}")
    return {receiver: sorted(found[receiver]) for receiver in sorted(found)}


def _needed(graph: Graph, sender: int) -> int:
    """Return the receiver without which a sender's output would be a constant."""
    layer, place = divmod(sender - 1, graph.heads + 1)
    if place == graph.heads:
        return graph.columns(layer, "mlp").start
    return graph.columns(layer, "v").start + place // graph.group


def _refuse(graph: Graph, sender: int, receiver: int, reason: str) -> None:
    name = graph.name(sender, receiver)
    raise ValueError(message("edges", "edges that matter", name, f"there is {reason}"))


def wire(graph: Graph, *, heads: int, mlps: int, seed: int = 0, sources: int = 2) -> list[str]:
    """Draw a circuit of some heads and MLPs, every one of which reaches the logits.

    Every input of values and of an MLP that takes part has up to ``sources`` senders, and so have
    two thirds of those of keys, and of these two thirds of those of queries. Senders that nothing
    reads yet are drawn first, so that circuits are deep; those left at the end go to the logits.

    Args:
        graph: All edges that there are.
        heads: How many heads take part.
        mlps: How many MLPs.
        seed: Of the draws.
        sources: Senders of a receiver at most.

    Returns:
        Names of edges, as `pahq.truth.plant` takes them.

    Raises:
        ValueError: More heads or MLPs than there are, or none of both.
    """
    check_range("heads", heads, 0, graph.layers * graph.heads + 1, "as many as the model has")
    check_range("mlps", mlps, 0, graph.layers + 1, "one of each layer")
    check_range("sources", sources, 1, 1 << 20, "a receiver has a sender")
    if not heads + mlps:
        raise ValueError(message("heads", "a head or an MLP", 0, "a circuit has a part"))
    draws = random.Random(seed)
    every = [graph.head(layer, h) for layer in range(graph.layers) for h in range(graph.heads)]
    chosen = set(draws.sample(every, heads))
    chosen |= {graph.mlp(layer) for layer in draws.sample(range(graph.layers), mlps)}
    unread, names = set(chosen), []

    def connect(receiver: int) -> None:
        up = graph.upstream(receiver)
        fresh = sorted(s for s in unread if s < up)
        rest = sorted(s for s in chosen - unread if s < up)
        draws.shuffle(fresh)
        pool = [0, *rest]
        draws.shuffle(pool)
        for sender in (fresh[:1] + pool + fresh[1:])[: draws.randint(1, sources)]:
            names.append(graph.name(sender, receiver))
            unread.discard(sender)

    for layer in range(graph.layers):
        first = graph.head(layer, 0)
        for group in range(graph.key_heads):
            start = group * graph.group
            inside = [h for h in range(start, start + graph.group) if first + h in chosen]
            if not inside:
                continue
            connect(graph.columns(layer, "v").start + group)
            if draws.random() < _CONTENT:
                connect(graph.columns(layer, "k").start + group)
                for head in inside:
                    if draws.random() < _CONTENT:
                        connect(graph.columns(layer, "q").start + head)
        if graph.mlp(layer) in chosen:
            connect(graph.columns(layer, "mlp").start)
    return names + [graph.name(sender, graph.logits) for sender in sorted(unread)]
