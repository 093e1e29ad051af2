"""Files of EAP-IG, which the circuit track of MIB takes, too.

**Scores.** There, a score is what the metric gains when an edge carries its corrupted value, and
the metric of the circuit track is a loss, minus the difference of logits. This is what
`Circuit.scores` holds, with the same sign: both are written and read as they are. Scores of a
metric that is to be kept high have the other sign. ``kl`` there is a mean over the vocabulary, ours
divided by its size. EAP-IG ranks edges by absolute value unless it is told otherwise, the
evaluation of the track by the score with its sign unless it gets ``--absolute``.

**Edges that were never tested** have NaN here. JSON knows no NaN, and a sort of a tensor puts it
before all numbers, so these files have 0 there, the lowest absolute value. So that they come back
as NaN, such an edge has ``"tested": false`` beside its score, and the tensor form has
``edges_tested``, both of which EAP-IG passes over. A file that it writes has neither: its scores of
0 are read as 0.

**Nodes** are marked as in the graph if some present edge leaves them and, save for the input, some
present edge enters them. EAP-IG works them out anew before a run, and drops the edges of all
others. Those had no influence: without an edge that enters it, a node has its corrupted value.

Heads that share keys have receivers of their own in these files: see `pahq.formats.per_query_head`
and, after reading, `pahq.formats.grouped`.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.files import write_bytes, write_text
from torch import Tensor

from pahq.circuit import Circuit
from pahq.formats._files import check_size
from pahq.formats.heads import per_query_head
from pahq.graph import Graph

if TYPE_CHECKING:
    import os

#: What torch raises on a file that is cut short, altered or no file of tensors.
_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError,
    AttributeError,
)  # fmt: skip
#: Senders times receivers of a graph that is read: a file of few bytes could ask for any number.
_LARGEST = 1 << 30


def to_mib_json(circuit: Circuit, path: str | os.PathLike[str], *, d_model: int) -> None:
    """Write all edges of the model, present or not, with scores, as JSON.

    Args:
        circuit: With shared keys or without.
        path: Of the file, which is replaced if there is one.
        d_model: Width of the model's residual stream.

    Raises:
        ValueError: A score is infinite, or a width below 1.
    """
    wide, scores, tested = _expanded(circuit)
    graph = wide.graph
    nodes = dict(zip(graph.sender_names, _nodes(wide).tolist(), strict=True))
    real = torch.from_numpy(graph.full())
    edges: dict[str, dict[str, float | bool]] = {}
    columns = (table[real].tolist() for table in (scores, wide.present, tested))
    for place, score, inside, known in zip(real.nonzero().tolist(), *columns, strict=True):
        edge = edges[graph.name(*place)] = {"score": score, "in_graph": inside}
        if not known:
            edge["tested"] = False
    document = {
        "cfg": _config(graph, d_model),
        "nodes": {
            name: {"in_graph": inside} for name, inside in (nodes | {"logits": True}).items()
        },
        "edges": edges,
    }
    write_text(path, json.dumps(document, allow_nan=False))


def from_mib_json(path: str | os.PathLike[str]) -> Circuit:
    """Read a file of EAP-IG's ``Graph.to_json`` or of `to_mib_json`.

    Returns:
        A circuit without shared keys; ``provenance`` has the format and ``d_model``. Edges that
        the file does not name are absent and were never tested; nor were those without a score.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Not such a file, a node or an edge that the model does not have, an infinite
            score, a circuit that leaves out neurons, or more than 2 GiB.
    """
    check_size(path)
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        remedy = "the file is cut short, nested too deeply or something else"
        raise ValueError(message("path", "a JSON file", str(error), remedy)) from error
    for key in ("cfg", "nodes", "edges"):
        if not isinstance(document, dict) or not isinstance(document.get(key), dict):
            found = sorted(document) if isinstance(document, dict) else type(document).__name__
            remedy = "was it written by Graph.to_json of EAP-IG?"
            raise ValueError(message("path", f"JSON with an object {key!r}", found, remedy))
    graph, d_model = _graph(document["cfg"])
    known = {*graph.sender_names, "logits"}
    for name, node in document["nodes"].items():
        if name not in known:
            _unknown("nodes", name)
        neurons = node.get("neurons", []) if isinstance(node, dict) else []
        if not isinstance(neurons, list) or neurons != [True] * len(neurons):
            _neurons(name)
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    scores = torch.full(tuple(present.shape), float("nan"))
    for name, edge in document["edges"].items():
        place = graph.edge(name)
        score, inside = _values(name, edge)
        present[place] = inside
        if edge.get("tested", True):
            scores[place] = score
    return _read(graph, present, scores, "mib-json", d_model)


def to_mib_pt(circuit: Circuit, path: str | os.PathLike[str], *, d_model: int) -> None:
    """Write presence and scores of all edges as tensors.

    ``edges_scores`` float32 and ``edges_in_graph`` bool ``(S, R)``, R in the order of `Graph`
    without shared keys: in a layer queries, keys, values, MLP; logits last. ``nodes_in_graph`` bool
    ``(S,)``.

    Args:
        circuit: With shared keys or without.
        path: Of the file, which is replaced if there is one.
        d_model: Width of the model's residual stream.

    Raises:
        ValueError: A score is infinite, or a width below 1.
    """
    wide, scores, tested = _expanded(circuit)
    file = io.BytesIO()
    document = {
        "cfg": _config(wide.graph, d_model),
        "src_nodes": wide.graph.sender_names, "dst_nodes": wide.graph.receiver_names,
        "edges_scores": scores, "edges_in_graph": wide.present, "edges_tested": tested,
        "nodes_in_graph": _nodes(wide),
    }  # fmt: skip
    torch.save(document, file)
    write_bytes(path, file.getvalue())


def from_mib_pt(path: str | os.PathLike[str]) -> Circuit:
    """Read a file of EAP-IG's ``Graph.to_pt`` or of `to_mib_pt`; no code in it is run.

    Returns:
        A circuit without shared keys; ``provenance`` has the format and ``d_model``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Not such a file, nodes that the model does not have or in another order, an
            infinite score, a circuit that leaves out neurons, or more than 2 GiB.
    """
    check_size(path)
    data = io.BytesIO(Path(path).read_bytes())
    try:
        document = torch.load(data, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        remedy = "was it written by Graph.to_pt of EAP-IG?"
        raise ValueError(message("path", "a file of tensors", str(error), remedy)) from error
    wanted = {"cfg", "src_nodes", "dst_nodes", "edges_in_graph"}
    found = set(document) if isinstance(document, dict) else set()
    if not wanted <= found or not isinstance(document["cfg"], dict):
        remedy = "was it written by Graph.to_pt of EAP-IG?"
        raise ValueError(message("path", f"entries {sorted(wanted)}", sorted(found), remedy))
    graph, d_model = _graph(document["cfg"])
    for key, names in (("src_nodes", graph.sender_names), ("dst_nodes", graph.receiver_names)):
        given = document[key]
        if given != names:
            for name in given if isinstance(given, list) else ():
                if name not in names:
                    _unknown(key, name)
            remedy = "rows and columns are those of EAP-IG's Graph of that cfg"
            raise ValueError(message(key, f"the {len(names)} of cfg in order", "others", remedy))
    shape = (graph.senders, graph.receivers)
    # binary circuits have no scores, and those of other writers nothing on tests
    scores = document.get("edges_scores", torch.full(shape, float("nan")))
    tested = document.get("edges_tested", torch.ones(shape, dtype=torch.bool))
    present = document["edges_in_graph"]
    tensors = {"edges_scores": scores, "edges_tested": tested, "edges_in_graph": present}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise ValueError(message(key, f"a tensor {shape}", tensor, "see cfg of the file"))
    neurons = document.get("neurons_in_graph")
    if neurons is not None and not (isinstance(neurons, Tensor) and bool(neurons.bool().all())):
        _neurons("neurons_in_graph")
    known = tested.bool() & torch.from_numpy(graph.full())
    scores = torch.where(known, scores.float(), float("nan"))
    return _read(graph, present.bool(), scores, "mib-pt", d_model)


def _expanded(circuit: Circuit) -> tuple[Circuit, Tensor, Tensor]:
    """Return the circuit without shared keys, scores with 0 for NaN, and what was tested."""
    wide = per_query_head(circuit)
    edges = torch.from_numpy(wide.graph.full())
    tested = edges & ~wide.scores.isnan()
    _finite(wide.graph, wide.scores)
    return wide, torch.where(tested, wide.scores, 0.0), tested


def _read(graph: Graph, present: Tensor, scores: Tensor, form: str, d_model: int) -> Circuit:
    _finite(graph, scores)
    return Circuit(graph, present, scores, {"format": form, "d_model": d_model})


def _finite(graph: Graph, scores: Tensor) -> None:
    for place in (scores.isinf() & torch.from_numpy(graph.full())).nonzero().tolist():
        name, remedy = graph.name(*place), "such a score has no rank; give it a number or NaN"
        raise ValueError(message(f"score of {name}", "a finite number", float("inf"), remedy))


def _nodes(circuit: Circuit) -> Tensor:
    """Return the senders, bool ``(S,)``, that some present edge leaves and some enters."""
    graph, present = circuit.graph, circuit.present
    entered = torch.zeros(graph.senders, dtype=torch.bool)
    entered[0] = True
    for receiver in present.any(0).nonzero()[:, 0].tolist():
        entered[graph.readers(receiver)] = True
    return entered & present.any(1)


def _config(graph: Graph, d_model: int) -> dict[str, int | bool]:
    check_range("d_model", d_model, 1, 1 << 31, "hidden_size of the model's config")
    return {
        "n_layers": graph.layers, "n_heads": graph.heads,
        "parallel_attn_mlp": graph.parallel, "d_model": d_model,
    }  # fmt: skip


def _graph(config: dict[str, Any]) -> tuple[Graph, int]:
    parallel, d_model = config.get("parallel_attn_mlp"), config.get("d_model")
    for key in ("n_layers", "n_heads", "d_model"):
        value = config.get(key)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise ValueError(message(f"cfg {key}", "a positive integer", value, "see the file"))
    if not isinstance(parallel, bool):
        raise ValueError(
            message("cfg parallel_attn_mlp", "true or false", parallel, "see the file")
        )
    layers, heads = config["n_layers"], config["n_heads"]
    # before Graph makes anything of that size
    size = (1 + layers * (heads + 1)) * (1 + layers * (3 * heads + 1))
    if size > _LARGEST:
        got = f"{layers} layers of {heads} heads"
        remedy = "no model has as many; is the file what it should be?"
        raise ValueError(message("cfg", f"a graph of at most {_LARGEST} entries", got, remedy))
    return Graph(layers, heads, heads, parallel), int(d_model or 0)


def _values(name: str, edge: Any) -> tuple[float, bool]:
    if isinstance(edge, dict):
        # binary circuits of the track have no scores
        score, inside = edge.get("score", float("nan")), edge.get("in_graph")
        if type(score) in (int, float) and isinstance(inside, bool):
            return float(score), inside
    remedy = "a score is a number, in_graph true or false"
    raise ValueError(message(f"edge {name}", "in_graph and perhaps a score", edge, remedy))


def _unknown(where: str, name: object) -> NoReturn:
    remedy = "names are input, a0.h0, m0 and logits; do layers and heads agree with cfg?"
    raise ValueError(message(where, "nodes of this model", name, remedy))


def _neurons(name: str) -> NoReturn:
    remedy = "circuits of neurons cannot be read; export edges"
    raise ValueError(message(name, "all neurons in the graph", "some left out", remedy))
