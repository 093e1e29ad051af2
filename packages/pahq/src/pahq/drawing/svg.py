"""A circuit on the grid of its model, layers upward, as SVG."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

from pahq.drawing._edges import (
    COLOURS,
    caption,
    dashes,
    edges_of,
    largest,
    used,
    width,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pahq.circuit import Circuit
    from pahq.drawing._edges import Edge
    from pahq.graph import Graph

_CELL, _LEFT, _LEGEND, _NARROWEST = 46, 56, 84, 620
_BOX, _HIGH = 34, 18
#: Lines that are not among so many of the strongest are drawn lighter if there are more.
_STRONG = 120

_STYLE = (
    ".pahq{font:11px Helvetica,Arial,sans-serif}"
    ".pahq .paper{fill:#ffffff}.pahq text{fill:#1c2126}.pahq .soft{fill:#5b6670}"
    ".pahq .node rect{fill:#ffffff;stroke:#d5d9dc;stroke-width:1}.pahq .node text{fill:none}"
    ".pahq .on rect{fill:#eef0f2;stroke:#1c2126;stroke-width:1.4}.pahq .on text{fill:#1c2126}"
    ".pahq .edges path,.pahq .key line{fill:none;stroke-linecap:butt}"
    + "".join(f".pahq .{kind}{{stroke:{colour}}}" for kind, colour in COLOURS.items())
    + "@media (prefers-color-scheme:dark){"
    ".pahq .paper,.pahq .node rect{fill:#14181b}.pahq text{fill:#e8eaec}.pahq .soft{fill:#9aa5ae}"
    ".pahq .node rect{stroke:#394249}.pahq .node text{fill:none}"
    ".pahq .on rect{fill:#2a3238;stroke:#e8eaec}.pahq .on text{fill:#e8eaec}"
    ".pahq .q{stroke:#56b4e9}.pahq .v{stroke:#2fc79a}.pahq .other{stroke:#a8a8a8}}"
)


class _Node(NamedTuple):
    name: str
    label: str
    x: float
    y: float
    width: float
    height: float


class Layout:
    """Where nodes stand and lines begin and end, in pixels, y downward.

    Args:
        graph: Of the circuit.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.shared = graph.key_heads != graph.heads
        self.row = 70 if self.shared else 60
        self.columns = graph.heads * _CELL
        self.right = _LEFT + self.columns + _CELL + 30
        self.width = max(_NARROWEST, self.right + 16)
        self.top = _LEGEND + 34
        self.bottom = self.top + graph.layers * self.row + 20
        self.height = self.bottom + 50

    def _layer(self, layer: int) -> float:
        """Return the middle of a layer's heads."""
        return self.bottom - 36 - layer * self.row - (12 if self.shared else 0)

    def _head(self, head: int) -> float:
        return _LEFT + (head + 0.5) * _CELL

    def _mlp(self, layer: int) -> tuple[float, float]:
        # an MLP reads its layer's heads unless both read the same
        up = 0 if self.graph.parallel else self.row * 0.42
        return _LEFT + self.columns + 18 + _CELL / 2, self._layer(layer) - up

    def nodes(self) -> Iterator[_Node]:
        """Yield all nodes of the model."""
        graph, wide = self.graph, self.columns + 18 + _CELL
        yield _Node("input", "input", _LEFT + wide / 2, self.bottom + 12, wide, _HIGH)
        for layer in range(graph.layers):
            y = self._layer(layer)
            for head in range(graph.heads):
                yield _Node(
                    f"a{layer}.h{head}", f"{layer}.{head}", self._head(head), y, _BOX, _HIGH
                )
            if self.shared:
                for index in range(graph.key_heads):
                    middle = _LEFT + (index + 0.5) * graph.group * _CELL
                    size = graph.group * _CELL - 12
                    yield _Node(f"a{layer}.kv{index}", "", middle, y + 18, size, 8)
            x, y = self._mlp(layer)
            yield _Node(f"m{layer}", f"m{layer}", x, y, _BOX, _HIGH)
        yield _Node("logits", "logits", _LEFT + wide / 2, self.top - 14, wide, _HIGH)

    def labels(self) -> Iterator[tuple[float, float, str]]:
        """Yield where names of rows and columns stand."""
        for layer in range(self.graph.layers):
            yield _LEFT - 28, self._layer(layer) + 4, str(layer)
        for head in range(self.graph.heads):
            yield self._head(head), self.bottom + 38, f"h{head}"
        yield self._mlp(0)[0], self.bottom + 38, "mlp"

    def _port(self, receiver: int) -> tuple[float, float]:
        """Return where lines into a receiver end."""
        layer, part, index = self.graph.place(receiver)
        if part == "mlp":
            x, y = self._mlp(layer)
            return x, y + _HIGH / 2
        below = self._layer(layer) + _HIGH / 2
        if self.shared and part in ("k", "v"):
            middle = _LEFT + (index + 0.5) * self.graph.group * _CELL
            aside = min(_CELL / 2, self.graph.group * _CELL / 4)
            return middle + (-aside if part == "k" else aside), below + 13
        if self.shared:
            return self._head(index), below
        return self._head(index) + {"q": -11, "k": 0, "v": 11}[part], below

    def path(self, edge: Edge) -> str:
        """Return the line of an edge, from below to above."""
        graph = self.graph
        # into logits and out of the input, lines of different layers stand side by side
        spread = _CELL * 0.7 / max(1, graph.layers - 1)
        if edge.sender:
            layer, place = divmod(edge.sender - 1, graph.heads + 1)
            if place < graph.heads:
                x, y = self._head(place), self._layer(layer) - _HIGH / 2
            else:
                x, y = self._mlp(layer)
                y -= _HIGH / 2
            shift = (layer - (graph.layers - 1) / 2) * spread
            end = (x + shift, self.top - 5.0)
        else:
            x, y = _LEFT + self.columns / 2, self.bottom + 3.0
            end = (x, self.top - 5.0)
        if edge.receiver != graph.logits:
            end = self._port(edge.receiver)
            if not edge.sender:
                layer = graph.place(edge.receiver)[0]
                x = end[0] + (layer - (graph.layers - 1) / 2) * spread
        lift = max(14.0, (y - end[1]) * 0.4)
        # lines within a column would run behind the nodes between
        apart = y - end[1] > self.row and abs(x - end[0]) < _BOX / 2
        bow = min(_CELL * 1.2, 12 + (y - end[1]) * 0.06) if apart else 0.0
        a, b = x + bow, end[0] + bow
        return (
            f"M{x:.0f} {y:.0f}C{a:.0f} {y - lift:.0f} {b:.0f} {end[1] + lift:.0f} "
            f"{end[0]:.0f} {end[1]:.0f}"
        )


def to_svg(circuit: Circuit) -> str:
    """Return a picture of a circuit that needs nothing else, about 0.2 kB for each edge.

    A row for each layer, from below to above, a column for each head and one for MLPs. Nodes that
    no present edge leaves or enters are pale. Lines into queries, keys and values have three
    colours that differ for all kinds of colour vision, others are grey; with shared keys, those of
    a group end at a bar below its heads. Width grows with the root of the absolute score; dashed
    lines have a score below 0, dotted ones none. Names and scores show when pointed at. Colours
    follow the viewer's light or dark mode.

    Args:
        circuit: Any.
    """
    edges = edges_of(circuit)
    return draw(circuit, edges, titles=True)


def draw(circuit: Circuit, edges: Sequence[Edge], *, titles: bool) -> str:
    """Return the picture, its lines in the order of the edges.

    Args:
        circuit: Whose picture.
        edges: As of `edges_of`.
        titles: Whether lines tell their name and score.
    """
    layout, top, on = Layout(circuit.graph), largest(edges), used(circuit, edges)
    size = f"{layout.width:.0f} {layout.height:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pahq" viewBox="0 0 {size}" '
        f'width="{layout.width:.0f}" height="{layout.height:.0f}" role="img" '
        f'aria-label="{_text(caption(circuit))}">',
        f"<style>{_STYLE}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        *_legend(circuit, top),
    ]
    weak = max(0, len(edges) - _STRONG)
    pale = max(0.25, 0.85 * (_STRONG / max(_STRONG, len(edges))) ** 0.5)
    for group, opacity in ((edges[:weak], pale), (edges[weak:], 0.85)):
        parts.append(f'<g class="edges" stroke-opacity="{opacity:.2f}">')
        parts += [_line(layout, edge, top, titles=titles) for edge in group]
        parts.append("</g>")
    for node in layout.nodes():
        state = "node on" if node.name in on else "node"
        x, y = node.x - node.width / 2, node.y - node.height / 2
        label = f'<text x="{node.x:.0f}" y="{node.y + 4:.0f}">{node.label}</text>'
        parts.append(
            f'<g class="{state}" data-node="{node.name}" text-anchor="middle">'
            f"<title>{node.name}</title>"
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{node.width:.0f}" height="{node.height:.0f}" '
            f'rx="4"/>{label if node.label else ""}</g>'
        )
    parts += [
        f'<text class="soft" x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{label}</text>'
        for x, y, label in layout.labels()
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(layout: Layout, edge: Edge, top: float, *, titles: bool) -> str:
    pattern = dashes(edge.score)
    dash = f' stroke-dasharray="{pattern}"' if pattern else ""
    line = (
        f'<path class="{edge.kind}" d="{layout.path(edge)}" '
        f'stroke-width="{width(edge.score, top):.1f}"{dash}'
    )
    return f"{line}><title>{_text(edge.label)}</title></path>" if titles else f"{line}/>"


def _legend(circuit: Circuit, top: float) -> Iterator[str]:
    yield f'<text x="16" y="24" font-weight="bold">{_text(caption(circuit))}</text>'
    kinds = {"q": "into queries", "k": "into keys", "v": "into values", "other": "others"}
    x = 16
    for kind, label in kinds.items():
        yield _sample(x, 46, kind, 3, label)
        x += 112
    yield _sample(x, 46, "other", 1.5, "below 0", "6 3")
    shown = [(f"{share * top:.2g}", width(share * top, top)) for share in (1, 0.1, 0.01) if top]
    x = 16
    for label, thick in shown:
        yield _sample(x, 68, "other", thick, f"effect {label}")
        x += 112
    yield _sample(x, 68, "other", width(float("nan"), top), "not tested", "1 3")


def _sample(x: int, y: int, kind: str, thick: float, label: str, dash: str = "") -> str:
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<g class="key"><line class="{kind}" x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}" '
        f'stroke-width="{thick:.1f}"{pattern}/>'
        f'<text class="soft" x="{x + 32}" y="{y + 4}">{label}</text></g>'
    )


def _text(text: str) -> str:
    # characters that XML cannot hold even when escaped
    kept = "".join(c for c in text if c in "\t\n" or (c >= " " and not _forbidden(c)))
    return escape(kept, quote=True)


def _forbidden(character: str) -> bool:
    return "\ud800" <= character <= "\udfff" or character in "\ufffe\uffff"
