"""Circuits that people found by hand and published, as sets of edges.

Papers name heads, and say which group of them acts on which; they do not name all edges. Which of
queries, keys and values a group acts on, and which MLPs take part, are here as Conmy et al. set
them down for their measurements (arXiv:2304.14997, and its code), without direct edges, which
`pahq.Graph` does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import message

from pahq.circuit import Circuit
from pahq.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GPT2_SMALL = Graph(12, 12, 12)
ATTN_ONLY_4L = Graph(4, 8, 8)

#: 26 heads of GPT-2 small, in the groups of Wang et al. (arXiv:2211.00593).
IOI_GROUPS: Mapping[str, Sequence[str]] = {
    "duplicate token": ("a0.h1", "a0.h10", "a3.h0"),
    "previous token": ("a2.h2", "a4.h11"),
    "induction": ("a5.h5", "a5.h8", "a5.h9", "a6.h9"),
    "s-inhibition": ("a7.h3", "a7.h9", "a8.h6", "a8.h10"),
    "name mover": ("a9.h6", "a9.h9", "a10.h0"),
    "backup name mover": (
        "a9.h0", "a9.h7", "a10.h1", "a10.h2", "a10.h6", "a10.h10", "a11.h2", "a11.h9",
    ),
    "negative name mover": ("a10.h7", "a11.h10"),
}  # fmt: skip
#: Which group acts on which, and on what of it.
IOI_CONNECTIONS: Sequence[tuple[str, str, str]] = (
    ("input", "duplicate token", "qkv"),
    ("input", "previous token", "qkv"),
    ("input", "s-inhibition", "q"),
    ("input", "name mover", "kv"),
    ("input", "backup name mover", "kv"),
    ("input", "negative name mover", "kv"),
    ("previous token", "induction", "kv"),
    ("duplicate token", "s-inhibition", "kv"),
    ("induction", "s-inhibition", "kv"),
    ("s-inhibition", "name mover", "q"),
    ("s-inhibition", "backup name mover", "q"),
    ("s-inhibition", "negative name mover", "q"),
    ("name mover", "logits", ""),
    ("backup name mover", "logits", ""),
    ("negative name mover", "logits", ""),
)

#: Heads and MLPs of GPT-2 small, in the groups of Hanna et al. (arXiv:2305.00586).
GREATER_THAN_GROUPS: Mapping[str, Sequence[str]] = {
    "first": ("a0.h1",),
    "early": ("a0.h3", "a0.h5"),
    "early mlp": ("m0", "m1", "m2", "m3"),
    "mid": ("a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1"),
    "late mlp": ("m8", "m9", "m10", "m11"),
}
#: The queries of mid heads are those of the clean input: of all MLPs before them, and of what these
#: MLPs, those of layers 0 to 8, read of each other.
GREATER_THAN_CONNECTIONS: Sequence[tuple[str, str, str]] = (
    ("input", "first", "qkv"),
    ("input", "early", "qkv"),
    ("input", "early mlp", ""),
    ("first", "early mlp", ""),
    ("first", "mid", "qkv"),
    ("early", "mid", "qkv"),
    ("early mlp", "early mlp", ""),
    ("early mlp", "mid", "qkv"),
    ("mid", "late mlp", ""),
    ("late mlp", "late mlp", ""),
    ("mid", "logits", ""),
    ("late mlp", "logits", ""),
    ("mlp to 8", "mlp to 8", ""),
    ("mlp to 8", "mid", "q"),
)

#: Heads of attn-only-4l that give the answer (Heimersheim and Janiak, A circuit for Python
#: docstrings in a 4-layer attention-only transformer, Alignment Forum, 2023). The rest stand alone.
DOCSTRING_GROUPS: Mapping[str, Sequence[str]] = {"argument mover": ("a3.h0", "a3.h6")}
DOCSTRING_CONNECTIONS: Sequence[tuple[str, str, str]] = (
    ("input", "a0.h5", "v"),
    ("input", "a1.h2", "qk"),
    ("a0.h5", "a1.h2", "qk"),
    ("input", "a1.h4", "v"),
    ("a0.h5", "a1.h4", "v"),
    ("input", "a2.h0", "qk"),
    ("a0.h5", "a2.h0", "qk"),
    ("a1.h4", "a2.h0", "v"),
    ("a1.h4", "argument mover", "q"),
    ("a1.h2", "argument mover", "k"),
    ("a2.h0", "argument mover", "k"),
    ("input", "argument mover", "v"),
    ("a0.h5", "argument mover", "v"),
    ("argument mover", "logits", ""),
)


def ioi(graph: Graph, *, mlps: bool = False) -> Circuit:
    """Return the circuit of indirect object identification in GPT-2 small, 182 edges.

    It is of heads, whose authors let the MLPs between them follow: without MLPs it tells which
    heads matter, and does not run as the model does.

    Args:
        graph: Of the model.
        mlps: Whether MLPs take part: all edges between the embeddings, the MLPs and the logits,
            from MLPs to the 26 heads, and from these to MLPs. These 963 edges are what Conmy et
            al. compare with (1,041 with direct edges).

    Returns:
        Its edges, with a score of 1; all others have 0.

    Raises:
        ValueError: Another model's graph.
    """
    _check(graph, GPT2_SMALL, "GPT-2 small")
    heads = [head for group in IOI_GROUPS.values() for head in group]
    groups, connections = dict(IOI_GROUPS), list(IOI_CONNECTIONS)
    if mlps:
        groups |= {"mlp": _mlps(12), "head": heads}
        connections += [
            ("input", "mlp", ""), ("input", "logits", ""), ("mlp", "mlp", ""),
            ("mlp", "logits", ""), ("mlp", "head", "qkv"), ("head", "mlp", ""),
        ]  # fmt: skip
    return _circuit(graph, groups, connections, "ioi", "arXiv:2211.00593")


def greater_than(graph: Graph) -> Circuit:
    """Return the circuit of greater-than in GPT-2 small, 235 edges (262 with direct edges).

    Args:
        graph: Of the model.

    Returns:
        Its edges, with a score of 1; all others have 0.

    Raises:
        ValueError: Another model's graph.
    """
    _check(graph, GPT2_SMALL, "GPT-2 small")
    groups = dict(GREATER_THAN_GROUPS) | {"mlp to 8": _mlps(9)}
    return _circuit(graph, groups, GREATER_THAN_CONNECTIONS, "greater_than", "arXiv:2305.00586")


def docstring(graph: Graph) -> Circuit:
    """Return the circuit of docstrings in attn-only-4l, 24 edges (37 with direct edges).

    That model has no MLPs, and a `pahq.Graph` has: in a copy of it whose MLPs are all zeros, their
    edges do nothing. `pahq.evaluation.auc_roc` counts them among the false ones, which raises the
    area; compare it with such areas only.

    Args:
        graph: Of the model.

    Returns:
        Its edges, with a score of 1; all others have 0.

    Raises:
        ValueError: Another model's graph.
    """
    _check(graph, ATTN_ONLY_4L, "attn-only-4l")
    source = "Heimersheim and Janiak, Alignment Forum, 2023"
    return _circuit(graph, DOCSTRING_GROUPS, DOCSTRING_CONNECTIONS, "docstring", source)


def _check(graph: Graph, wanted: Graph, model: str) -> None:
    if graph != wanted:
        remedy = "the circuit was found in that model and is of no other"
        raise ValueError(message("graph", f"that of {model}, {wanted}", graph, remedy))


def _mlps(count: int) -> list[str]:
    return [f"m{layer}" for layer in range(count)]


def _circuit(
    graph: Graph,
    groups: Mapping[str, Sequence[str]],
    connections: Iterable[tuple[str, str, str]],
    task: str,
    source: str,
) -> Circuit:
    """Return all edges from each member of a group to those members of another that follow it."""
    senders = {name: number for number, name in enumerate(graph.sender_names)}
    receivers = {name: number for number, name in enumerate(graph.receiver_names)}
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    for first, second, parts in connections:
        rows = [senders[node] for node in groups.get(first, (first,))]
        read = groups.get(second, (second,))
        names = [f"{node}<{part}>" for part in parts for node in read] if parts else read
        columns = [receivers[name] for name in names]
        present[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    found = Circuit(graph, present, torch.zeros(present.shape))
    found.scores[found.present] = 1
    found.provenance = {
        "method": "published", "task": task, "source": source,
        "groups": {name: list(nodes) for name, nodes in groups.items()},
    }  # fmt: skip
    return found
