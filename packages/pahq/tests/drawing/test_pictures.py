"""DOT and SVG: well-formed, complete, and with the texts of others escaped."""

import re
from xml.etree import ElementTree

import pytest
import torch
from pahq import Circuit, Graph
from pahq.drawing import to_dot, to_svg
from pahq.drawing.svg import Layout

SVG = "{http://www.w3.org/2000/svg}"
GRAPH = Graph(3, 4, 2)
EVIL = '</svg><script>alert(1)</script>&"\\N\x00\n'


def circuit(graph=GRAPH, count=40, seed=0, **known):
    draws = torch.Generator().manual_seed(seed)
    edges = torch.from_numpy(graph.full()).nonzero()
    chosen = edges[torch.randperm(len(edges), generator=draws)[:count]]
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    scores = torch.full(present.shape, float("nan"))
    present[chosen[:, 0], chosen[:, 1]] = True
    scores[chosen[2:, 0], chosen[2:, 1]] = torch.randn(max(0, count - 2), generator=draws)
    return Circuit(graph, present, scores, known)


def lines(text):
    """Return class, title and attributes of the lines of a picture."""
    root = ElementTree.fromstring(text)
    return [
        (path.get("class"), path.find(f"{SVG}title").text, path)
        for group in root.iter(f"{SVG}g")
        if group.get("class") == "edges"
        for path in group.iter(f"{SVG}path")
    ]


GRAPHS = [GRAPH, Graph(3, 4, 4), Graph(2, 4, 1, parallel=True), Graph(1, 1, 1)]


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_edge_is_drawn_once(graph):
    made = circuit(graph, min(40, graph.edges))
    titles = [title.split(":")[0] for _, title, _ in lines(to_svg(made))]
    assert sorted(titles) == sorted(made.edges())
    tips = re.findall(r'tooltip="([^":]+):', to_dot(made))
    assert sorted(tips) == sorted(made.edges())


@pytest.mark.parametrize("graph", GRAPHS)
def test_used_nodes_stand_out(graph):
    made = circuit(graph, min(12, graph.edges))
    ends = {end.split("<")[0] for name in made.edges() for end in name.split("->")}
    groups = ElementTree.fromstring(to_svg(made)).iter(f"{SVG}g")
    nodes = {g.get("data-node"): g.get("class") for g in groups if g.get("data-node")}
    assert {name for name, state in nodes.items() if state == "node on"} == ends
    receivers = {name.split("<")[0] for name in graph.receiver_names}
    assert set(nodes) == {*graph.sender_names} | receivers
    found = to_dot(made)
    assert set(re.findall(r'"(\S+)" \[shape=', found)) == ends


def test_colours_widths_and_dashes():
    made = circuit(count=0)
    for name, score in (("input->a1.h0<q>", 4.0), ("input->a1.kv0<k>", 1.0),
                        ("input->a1.kv0<v>", -1.0), ("input->m1", float("nan")),
                        ("m1->logits", 0.0)):  # fmt: skip
        place = GRAPH.edge(name)
        made.present[place], made.scores[place] = True, score
    found = {title: (kind, path) for kind, title, path in lines(to_svg(made))}
    kinds = {title: kind for title, (kind, _) in found.items()}
    assert kinds == {
        "input->a1.h0<q>: +4": "q", "input->a1.kv0<k>: +1": "k", "input->a1.kv0<v>: -1": "v",
        "input->m1: not tested": "other", "m1->logits: +0": "other",
    }  # fmt: skip
    width = {title: float(path.get("stroke-width")) for title, (_, path) in found.items()}
    assert width["input->a1.h0<q>: +4"] == 5
    assert width["input->a1.kv0<k>: +1"] == width["input->a1.kv0<v>: -1"]
    assert width["m1->logits: +0"] < width["input->a1.kv0<k>: +1"] < 5
    dash = {title: path.get("stroke-dasharray") for title, (_, path) in found.items()}
    assert dash["input->a1.kv0<k>: +1"] is None
    assert len({*dash.values()}) == 3
    assert dash["input->a1.kv0<v>: -1"] != dash["input->m1: not tested"]
    style = ElementTree.fromstring(to_svg(made)).find(f"{SVG}style").text
    light = style.split("@media")[0]
    colours = re.findall(r"\.pahq \.(?:q|k|v|other)\{stroke:(#\w+)\}", light)
    assert len(set(colours)) == 4
    assert "prefers-color-scheme:dark" in style
    # the strongest is drawn last, on top
    assert lines(to_svg(made))[-1][1] == "input->a1.h0<q>: +4"


@pytest.mark.parametrize("graph", [*GRAPHS, Graph(30, 9, 3), Graph(12, 12, 12)])
def test_layers_go_upward_and_nothing_overlaps(graph):
    layout = Layout(graph)
    boxes = list(layout.nodes())
    for node in boxes:
        assert node.width / 2 <= node.x <= layout.width - node.width / 2
        assert node.height / 2 <= node.y <= layout.height - node.height / 2
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert (abs(a.x - b.x) >= (a.width + b.width) / 2
                    or abs(a.y - b.y) >= (a.height + b.height) / 2), (a, b)  # fmt: skip
    heights = {node.name: node.y for node in boxes}
    # an MLP stands above the heads that it reads
    assert (heights["m0"] < heights["a0.h0"]) is not graph.parallel
    for _, title, path in lines(to_svg(circuit(graph, min(200, graph.edges)))):
        numbers = [float(n) for n in re.findall(r"-?\d+", path.get("d"))]
        assert numbers[1] > numbers[-1], title


@pytest.mark.parametrize("text", [to_svg, to_dot])
def test_no_edges(text):
    found = text(circuit(count=0))
    assert "0 of" in found
    assert "->" not in found.replace("&gt;", ">")


def test_texts_of_others_stay_texts():
    known = {"task": EVIL, "method": EVIL, "model": "<b>", "threshold": EVIL}
    found = to_svg(circuit(**known))
    assert "<script" not in found
    root = ElementTree.fromstring(found)
    assert "<script>alert(1)</script>" in root.get("aria-label")
    found = to_dot(circuit(**known))
    label = next(line for line in found.splitlines() if line.startswith("  label="))
    # one string, whose quotes and backslashes are escaped
    assert re.fullmatch(r'  label="(?:[^"\\]|\\.)*"; labelloc=t; fontname=Helvetica;', label)
    assert r"\\N" in label
    assert "&amp;" in label


def test_dot_ties_shared_keys_to_their_heads():
    made = circuit(count=0)
    for name in ("input->a1.kv1<k>", "a1.h2->logits", "a1.h0->logits"):
        made.present[GRAPH.edge(name)] = True
    found = to_dot(made)
    assert '"a1.kv1" -> "a1.h2" [style=dotted' in found
    assert '"a1.kv1" -> "a1.h0"' not in found
    assert '"a1.h3"' not in found
    assert found.count("{") == found.count("}")


def test_size():
    graph = Graph(12, 12, 12)
    assert len(to_svg(circuit(graph, 5000)).encode()) < 1_200_000
