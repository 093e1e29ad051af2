"""Receivers of keys and values: one for each query head, or one for all that share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import message

from pahq.circuit import Circuit
from pahq.graph import Graph

if TYPE_CHECKING:
    from torch import Tensor


def per_query_head(circuit: Circuit) -> Circuit:
    """Return a circuit in which each query head has receivers of keys and values of its own.

    An edge into ``a3.kv0<k>`` becomes one into ``a3.h0<k>`` and into each other head of the group,
    present or absent as it was, with the score that it had. Those scores are of the shared edge:
    what all of the group have together, not what one of them has alone.

    Args:
        circuit: With shared keys; one without is copied.
    """
    graph = circuit.graph
    wide = Graph(graph.layers, graph.heads, graph.heads, graph.parallel)
    index = torch.tensor([_shared(graph, *wide.place(r)) for r in range(wide.receivers)])
    return Circuit(
        wide, circuit.present[:, index], circuit.scores[:, index], dict(circuit.provenance)
    )


def grouped(circuit: Circuit, key_heads: int) -> Circuit:
    """Return a circuit in which query heads that share keys share their receivers.

    An edge into a shared receiver is present if one into any of its heads is. Its score is that of
    largest absolute value among them, the first of equals, NaN if none has one.
    ``grouped(per_query_head(c), K)`` has the edges and scores of c.

    Args:
        circuit: One in which each query head has receivers of its own.
        key_heads: K, heads of keys of the model.

    Raises:
        ValueError: Receivers are shared already, or K does not divide the number of heads.
    """
    wide = circuit.graph
    if wide.key_heads != wide.heads:
        remedy = "its heads share receivers already; call per_query_head first"
        raise ValueError(
            message("circuit", f"{wide.heads} receivers of keys", wide.key_heads, remedy)
        )
    graph = Graph(wide.layers, wide.heads, key_heads, wide.parallel)
    present, scores = [], []
    for layer in range(wide.layers):
        for part in ("q", "k", "v", "mlp"):
            columns = wide.columns(layer, part)
            size = graph.group if part in ("k", "v") else 1
            present.append(circuit.present[:, columns].unflatten(1, (-1, size)).any(-1))
            scores.append(_largest(circuit.scores[:, columns].unflatten(1, (-1, size))))
    present.append(circuit.present[:, -1:])
    scores.append(circuit.scores[:, -1:])
    return Circuit(graph, torch.cat(present, 1), torch.cat(scores, 1), dict(circuit.provenance))


def _shared(graph: Graph, layer: int, part: str, index: int) -> int:
    """Return the receiver that is shared by the one of a query head."""
    if part == "logits":
        return graph.logits
    first = graph.columns(layer, part).start
    return first + (index // graph.group if part in ("k", "v") else index)


def _largest(scores: Tensor) -> Tensor:
    """Return the score of largest absolute value along the last dimension."""
    rank = scores.abs().nan_to_num(nan=-1.0, posinf=float("inf"))
    return scores.gather(-1, rank.argmax(-1, keepdim=True)).squeeze(-1)
