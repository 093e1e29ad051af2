"""DOT text, for graphviz and all that reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pahq.drawing._edges import (
    COLOURS,
    caption,
    dashes,
    edges_of,
    largest,
    node_of,
    used,
    width,
)

if TYPE_CHECKING:
    from pahq.circuit import Circuit
    from pahq.graph import Graph

_SHAPES = {"a": "ellipse", "m": "box", "i": "box", "l": "box"}


def to_dot(circuit: Circuit) -> str:
    """Return a circuit as a directed graph in DOT: ``dot -Tsvg circuit.dot``.

    Only nodes that the circuit uses are there. Layers go upward; edges into queries, keys, values
    and others have different colours, those with a score below 0 are dashed, those without one
    dotted, and width grows with the absolute score. Dotted lines without an arrow tie shared keys
    and values (``a3.kv0``) to the heads that use them.

    Args:
        circuit: Any.
    """
    graph, edges = circuit.graph, edges_of(circuit)
    top, nodes = largest(edges), used(circuit, edges)
    lines = [
        "digraph circuit {", "  rankdir=BT; ranksep=0.6; nodesep=0.15;",
        f"  label={_quoted(caption(circuit))}; labelloc=t; fontname=Helvetica;",
        "  node [fontname=Helvetica, fontsize=11, margin=0.06, height=0.3];",
        "  edge [arrowsize=0.5];",
    ]  # fmt: skip
    for names in _rows(graph):
        row = [name for name in names if name in nodes]
        if row:
            inner = " ".join(f"{_quoted(name)} [shape={_SHAPES[name[0]]}];" for name in row)
            lines.append(f"  {{ rank=same; {inner} }}")
    for edge in edges:
        source = graph.sender_names[edge.sender]
        target = node_of(graph.receiver_names[edge.receiver])
        style = {None: "solid", "6 3": "dashed", "1 3": "dotted"}[dashes(edge.score)]
        lines.append(
            f"  {_quoted(source)} -> {_quoted(target)} [color={_quoted(COLOURS[edge.kind])}, "
            f"penwidth={width(edge.score, top):.2f}, style={style}, "
            f"tooltip={_quoted(edge.label)}];"
        )
    lines += [
        f"  {_quoted(shared)} -> {_quoted(head)} [style=dotted, arrowhead=none, color=gray];"
        for shared, head in _ties(graph)
        if shared in nodes and head in nodes
    ]
    return "\n".join([*lines, "}"]) + "\n"


def _rows(graph: Graph) -> list[list[str]]:
    """Return the names of nodes that stand side by side, from the input up."""
    rows = [["input"]]
    for layer in range(graph.layers):
        if graph.key_heads != graph.heads:
            rows.append([f"a{layer}.kv{index}" for index in range(graph.key_heads)])
        heads = [f"a{layer}.h{head}" for head in range(graph.heads)]
        rows += [[*heads, f"m{layer}"]] if graph.parallel else [heads, [f"m{layer}"]]
    return [*rows, ["logits"]]


def _ties(graph: Graph) -> list[tuple[str, str]]:
    if graph.key_heads == graph.heads:
        return []
    return [
        (f"a{layer}.kv{head // graph.group}", f"a{layer}.h{head}")
        for layer in range(graph.layers)
        for head in range(graph.heads)
    ]


def _quoted(text: str) -> str:
    # graphviz reads backslashes, and entities such as &lt;, inside quotes, too
    for old, new in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"), ("\r", ""), ("\n", "\\n")):
        text = text.replace(old, new)
    return f'"{text}"'
