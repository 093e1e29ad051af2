"""Sets of edges, graphs of networkx, and files."""

import math
import sys

import pytest
import torch
from pahq import Circuit, Graph

GRAPH = Graph(2, 2, 1)


def circuit(*names):
    present = torch.zeros(GRAPH.senders, GRAPH.receivers, dtype=torch.bool)
    for name in names:
        present[GRAPH.edge(name)] = True
    scores = torch.full(present.shape, float("nan"))
    scores[present] = 0.5
    return Circuit(GRAPH, present, scores, {"method": "acdc"})


def test_sets():
    a = circuit("input->m0", "m0->logits", "a0.h1->m1")
    b = circuit("m0->logits", "input->logits")
    assert [*(a & b).edges()] == ["m0->logits"]
    assert len(a | b) == 4
    assert sorted((a - b).edges()) == ["a0.h1->m1", "input->m0"]
    assert a.jaccard(b) == 0.25
    assert circuit().jaccard(circuit()) == 1
    assert a.density == 3 / GRAPH.edges
    other = Circuit(Graph(1, 1, 1), torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="other: expected circuits of one model"):
        a & other


def test_edges_that_there_cannot_be_are_no_edges():
    shape = (GRAPH.senders, GRAPH.receivers)
    assert len(Circuit(GRAPH, torch.ones(shape), torch.zeros(shape))) == GRAPH.edges
    with pytest.raises(ValueError, match="present: expected shape"):
        Circuit(GRAPH, torch.ones(2, 2), torch.zeros(shape))


def test_files(tmp_path):
    made = circuit("input->m0", "a0.h1->a1.kv0<k>")
    made.save_pretrained(tmp_path / "c")
    found = Circuit.from_pretrained(tmp_path / "c")
    assert found.graph == made.graph
    assert torch.equal(found.present, made.present)
    assert torch.equal(found.scores.nan_to_num(), made.scores.nan_to_num())
    assert found.provenance == {"method": "acdc"}
    with pytest.raises(FileExistsError):
        made.save_pretrained(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        Circuit.from_pretrained(tmp_path / "d")


def graph_of(*names, graph=GRAPH, **provenance):
    pytest.importorskip("networkx")
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    for name in names:
        present[graph.edge(name)] = True
    scores = torch.arange(present.numel()).view(present.shape).float()
    return Circuit(graph, present, scores, provenance).to_networkx()


def test_networkx():
    made = graph_of("input->m0", "m0->a1.h1<q>", "a1.h1->logits", "input->logits", method="acdc")
    assert made.is_directed()
    assert made.is_multigraph()
    assert dict(made.nodes(data=True)) == {
        "input": {"layer": -1, "kind": "input"}, "m0": {"layer": 0, "kind": "mlp"},
        "a1.h1": {"layer": 1, "kind": "head"}, "logits": {"layer": 2, "kind": "logits"},
    }  # fmt: skip
    found = {(a, b, key): data for a, b, key, data in made.edges(keys=True, data=True)}
    score = lambda name: float(GRAPH.edge(name)[0] * GRAPH.receivers + GRAPH.edge(name)[1])  # noqa: E731
    assert found == {
        ("input", "m0", "m0"): {"receiver": "m0", "kind": "mlp", "score": score("input->m0")},
        ("m0", "a1.h1", "a1.h1<q>"): {
            "receiver": "a1.h1<q>", "kind": "q", "score": score("m0->a1.h1<q>"),
        },
        ("a1.h1", "logits", "logits"): {
            "receiver": "logits", "kind": "logits", "score": score("a1.h1->logits"),
        },
        ("input", "logits", "logits"): {
            "receiver": "logits", "kind": "logits", "score": score("input->logits"),
        },
    }  # fmt: skip
    assert made.graph == {"method": "acdc"}


def test_networkx_of_shared_keys():
    """Each head of a group reads what the group's receiver does; a head can read it thrice."""
    names = ["m0->a1.h2<q>", "m0->a1.kv1<k>", "m0->a1.kv1<v>"]
    made = graph_of(*names, graph=Graph(2, 4, 2))
    assert sorted(made.edges(keys=True)) == [
        ("m0", "a1.h2", "a1.h2<q>"), ("m0", "a1.h2", "a1.kv1<k>"), ("m0", "a1.h2", "a1.kv1<v>"),
        ("m0", "a1.h3", "a1.kv1<k>"), ("m0", "a1.h3", "a1.kv1<v>"),
    ]  # fmt: skip
    own = graph_of("m0->a1.h2<k>", graph=Graph(2, 4, 4))
    assert [*own.edges(keys=True)] == [("m0", "a1.h2", "a1.h2<k>")]


@pytest.mark.parametrize("graph", [GRAPH, Graph(3, 4, 2), Graph(2, 2, 2, parallel=True)])
def test_networkx_of_all_edges(graph):
    """Heads count once for their query, and once for each key and value that they share."""
    networkx = pytest.importorskip("networkx")
    full = torch.from_numpy(graph.full())
    made = Circuit(graph, full, torch.full(full.shape, float("nan"))).to_networkx()
    assert [*made] == [*graph.sender_names, "logits"]
    readers = torch.tensor([len(graph.readers(r)) or 1 for r in range(graph.receivers)])
    assert made.number_of_edges() == int((full * readers).sum())
    assert networkx.is_directed_acyclic_graph(made)
    assert all(math.isnan(score) for _, _, score in made.edges(data="score"))
    order = {name: number for number, name in enumerate(made)}
    assert all(order[a] < order[b] for a, b in made.edges())


def test_networkx_of_nothing():
    assert not len(graph_of())


def test_without_networkx(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"needs networkx: pip install 'pahq\[networkx\]'"):
        circuit().to_networkx()
