"""Prune scores of auto-circuit 1.0.1.

They are a number for each edge, in one tensor for each place that reads the residual stream, under
the name of its hook in TransformerLens:

- ``blocks.3.hook_q_input``, ``hook_k_input``, ``hook_v_input``: ``(H, senders before it)``,
- ``blocks.3.hook_mlp_in``: ``(senders before it,)``,
- ``blocks.{L-1}.hook_resid_post``, the logits: ``(S,)``.

These are the shapes of ``patchable_model(model, factorized=True, separate_qkv=True)`` without
``seq_len``. Senders are in the order of `Graph`. Heads that share keys have one row each.

auto-circuit knows no set of edges: a circuit of n edges is the n of largest absolute value. What
values are depends on the method. Gradients give what a removal adds to the loss, with the sign of
`Circuit.scores`. ACDC gives the smallest threshold at which the edge was pruned, and infinity if it
never was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from shared_kernels._checks import check_choice, message
from shared_kernels.files import write_bytes
from torch import Tensor

from pahq.circuit import Circuit
from pahq.formats._files import check_size
from pahq.formats.heads import grouped, per_query_head
from pahq.graph import Graph

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

_HOOKS = {"q": "hook_q_input", "k": "hook_k_input", "v": "hook_v_input", "mlp": "hook_mlp_in"}


def to_auto_circuit(circuit: Circuit, *, values: str = "score") -> dict[str, Tensor]:
    """Return prune scores, float32, of which auto-circuit makes the same circuit.

    Args:
        circuit: With shared keys or without.
        values: ``score``: present edges have their score, all others 0, so that the edges of
            largest absolute value are those of the circuit, and fewer are those of `Circuit.top`.
            If no present edge has a score, they have infinity. ``pruned_at``: as after ACDC at one
            threshold, which absent edges have, and present ones infinity; scores are lost.

    Raises:
        ValueError: A score is infinite, or only some of the present edges have one: the others
            have no rank. Or ``pruned_at`` of a circuit without edges, or without a threshold in its
            provenance.
    """
    check_choice("values", values, ("score", "pruned_at"))
    wide = per_query_head(circuit)
    if values == "pruned_at":
        absent = wide.provenance.get("threshold")
        if not isinstance(absent, float | int):
            remedy = "circuits of CircuitFinder.acdc have one; or use values='score'"
            raise ValueError(message("circuit", "a threshold in its provenance", absent, remedy))
        if not len(wide):
            remedy = "that nothing stayed would be read as that all did; use values='score'"
            raise ValueError(message("circuit", "one edge or more", "none", remedy))
        table = torch.where(wide.present, float("inf"), float(absent))
    else:
        if bool((wide.present & wide.scores.isinf()).any()):
            remedy = "infinity is for edges without a score"
            raise ValueError(message("circuit", "finite scores", float("inf"), remedy))
        missing = int((wide.present & wide.scores.isnan()).sum())
        if 0 < missing < len(wide):
            remedy = "give scores to all or to none; edges without one have no rank"
            raise ValueError(message("circuit", f"{len(wide)} scores", len(wide) - missing, remedy))
        table = torch.where(wide.present, wide.scores.nan_to_num(nan=float("inf")), 0.0)
    return {
        # rows of their own, as safetensors wants them
        name: table[: shape[-1], columns]
        .T.reshape(shape)
        .clone(memory_format=torch.contiguous_format)
        for name, columns, shape in _places(wide.graph)
    }


def from_auto_circuit(
    values: Mapping[str, Tensor], graph: Graph, *, threshold: float | None = None
) -> Circuit:
    """Return the circuit of prune scores.

    Args:
        values: A tensor for each hook, with all hooks that the model has.
        graph: The model's; heads that share keys in it share receivers as `grouped` says.
        threshold: An edge whose absolute value is above it is present. By default those that were
            never pruned, if there are any, that is infinite values; else all that are not 0. Give
            it for an ACDC of auto-circuit in which nothing may have stayed: all values are those at
            which edges were pruned then, and nothing tells them from effects.

    Returns:
        The circuit. Scores are the values, and NaN for those of 0; all are NaN if one value is
        infinite, because then the others are thresholds and not effects.

    Raises:
        ValueError: Hooks are missing or unknown, a tensor has another shape or NaN, or a threshold
            below 0.
    """
    if threshold is not None and not threshold >= 0:
        raise ValueError(message("threshold", "at least 0", threshold, "values are absolute"))
    wide = Graph(graph.layers, graph.heads, graph.heads, graph.parallel)
    places = list(_places(wide))
    _same_hooks(values, [name for name, _, _ in places])
    table = torch.zeros(wide.senders, wide.receivers)
    for name, columns, shape in places:
        found = values[name]
        if tuple(found.shape) != shape:
            remedy = "patch with factorized=True, separate_qkv=True, seq_len=None"
            raise ValueError(message(name, f"shape {shape}", found, remedy))
        if bool(found.isnan().any()):
            raise ValueError(message(name, "numbers", "NaN", "such an edge has no rank"))
        block = found.detach().float().cpu().reshape(-1, shape[-1])
        table[: shape[-1], columns] = block.T
    never = table.isinf()
    if threshold is not None:
        present = table.abs() > threshold
    else:
        present = never if bool(never.any()) else table != 0
    scored = (table != 0) & (not bool(never.any()))
    scores = torch.where(scored, table, float("nan"))
    circuit = Circuit(wide, present, scores, {"format": "auto-circuit"})
    return circuit if graph == wide else grouped(circuit, graph.key_heads)


def save_auto_circuit(
    circuit: Circuit, path: str | os.PathLike[str], *, values: str = "score"
) -> None:
    """Write prune scores as safetensors; ``safetensors.torch.load_file`` returns them.

    Args:
        circuit: With shared keys or without.
        path: Of the file, which is replaced if there is one.
        values: See `to_auto_circuit`.

    Raises:
        ValueError: As `to_auto_circuit`.
    """
    write_bytes(path, save(to_auto_circuit(circuit, values=values)))


def load_auto_circuit(
    path: str | os.PathLike[str], graph: Graph, *, threshold: float | None = None
) -> Circuit:
    """Read prune scores out of a file of safetensors.

    Args:
        path: Of the file.
        graph: The model's.
        threshold: See `from_auto_circuit`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: No safetensors, more than 2 GiB, or as `from_auto_circuit`.
    """
    check_size(path)
    try:
        values = load_file(path)
    except SafetensorError as error:
        remedy = "auto-circuit itself writes pickles: convert them where they were made"
        raise ValueError(message("path", "a file of safetensors", str(error), remedy)) from error
    return from_auto_circuit(values, graph, threshold=threshold)


def _places(graph: Graph) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
    """Yield name, receivers and shape of each tensor."""
    for layer in range(graph.layers):
        for part, hook in _HOOKS.items():
            columns = graph.columns(layer, part)
            before = graph.upstream(columns.start)
            shape = (before,) if part == "mlp" else (graph.heads, before)
            yield f"blocks.{layer}.{hook}", columns, shape
    last = slice(graph.logits, graph.receivers)
    yield f"blocks.{graph.layers - 1}.hook_resid_post", last, (graph.senders,)


def _same_hooks(values: Mapping[str, Tensor], wanted: list[str]) -> None:
    remedy = "patch with factorized=True, separate_qkv=True; are graph and model the same?"
    for name in values:
        if name not in wanted:
            raise ValueError(message("values", f"hooks such as {wanted[0]}", name, remedy))
    for name in wanted:
        if name not in values:
            raise ValueError(message("values", f"a tensor {name}", "none", remedy))
