"""Logical gates of two parents, on which it is known what a search keeps.

Two heads of the first layer copy whether the prompt is clean, and its MLP tells the logits whether
both do (``and``) or any does (``or``). ACDC keeps both parents of the first; of the second exactly
one, for either may go while the other is there (Conmy et al., arXiv:2304.14997).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shared_kernels._checks import check_choice, message

from pahq.circuit import Circuit
from pahq.graph import Graph
from pahq.truth.planted import Builder, Planted

KINDS = ("and", "or")
#: Gain of neurons: activations of it are those of a rectifier to a part in 10^8.
_STEEP = 20.0


@dataclass
class Gate(Planted):
    """A gate and what is true of it.

    Attributes:
        kind: ``and`` or ``or``.
        branches: What is left of the circuit with one of its parents only: the first head of the
            model, and the last of its layer.
    """

    kind: str
    branches: tuple[Circuit, Circuit]


def gate(
    kind: str,
    *,
    graph: Graph | None = None,
    family: str = "llama",
    width: int = 32,
    vocabulary: int = 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Gate:
    """Build a model that is a gate, among heads and MLPs that do not matter.

    Clean prompts are of tokens of the first half of the vocabulary, corrupted ones of the second.

    Args:
        kind: ``and`` or ``or``.
        graph: Of the model; one layer of two heads by default.
        family: ``gpt2`` or ``llama``.
        width: D, of the residual stream.
        vocabulary: V, tokens.
        seed: Of all weights.
        dtype: Of parameters, float32 or float64.

    Raises:
        ValueError: Another kind, a model of one head, or as `pahq.truth.plant`.
    """
    check_choice("kind", kind, KINDS)
    graph = graph or Graph(1, 2, 2)
    if graph.heads < 2:
        raise ValueError(message("graph", "two heads or more", graph.heads, "a gate has two"))
    ends = ["m0->logits"]
    branches = [[*_parent(graph, head), *ends] for head in (0, graph.heads - 1)]
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(vocabulary, 1, dtype=torch.float64)
    half = vocabulary // 2
    tokens[:half] = 1
    both = (_STEEP, -_STEEP, 1 / _STEEP)
    neurons = [both] if kind == "and" else [(_STEEP, 0.0, 1 / _STEEP), (*both[:2], -both[2])]
    edges = [*dict.fromkeys(branches[0] + branches[1])]
    builder = Builder(graph, edges, family, width, tokens, draws, neurons=neurons, even=False)
    whole = builder.circuit()
    parts = []
    for names in branches:
        present = torch.zeros_like(whole.present)
        for name in names:
            present[graph.edge(name)] = True
        parts.append(Circuit(graph, present, present.float(), {"method": "planted"}))
    model = builder.build(dtype)
    every = torch.arange(vocabulary)
    return Gate(model, whole, every[:half], every[half:], kind, (parts[0], parts[1]))


def _parent(graph: Graph, head: int) -> list[str]:
    values = graph.columns(0, "v").start + head // graph.group
    return [graph.name(0, values), graph.name(graph.head(0, head), graph.columns(0, "mlp").start)]
