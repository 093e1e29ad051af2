"""Sets of edges, graphs of networkx, and files."""

import math
import sys

import pytest
import torch
from huggingface_hub import ModelCard
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


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    made, asked = circuit("input->m0"), {}
    made.save_pretrained(tmp_path / "snapshot")

    def download(name, **options):
        asked[name] = options
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("pahq.circuit.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    found = Circuit.from_pretrained("you/circuit", revision="main")
    assert torch.equal(found.present, made.present)
    assert asked["you/circuit"]["revision"] == "main"
    # a folder of that name comes first
    circuit("m0->logits").save_pretrained(tmp_path / "you" / "circuit")
    assert [*Circuit.from_pretrained("you/circuit").edges()] == ["m0->logits"]


def test_the_card_tells_what_there_is(tmp_path):
    made = circuit("input->m0", "a0.h1->a1.kv0<k>")
    made.provenance |= {"model": "LlamaForCausalLM", "threshold": 0.01, "checked": 0, "task": None}
    made.save_pretrained(tmp_path / "c")
    found = ModelCard.load(tmp_path / "c" / "README.md")
    assert found.data.library_name == "pahq"
    assert "circuit-discovery" in found.data.tags
    assert f"2 of {GRAPH.edges} edges" in found.text
    assert "# A circuit of a LlamaForCausalLM" in found.text
    assert "| threshold | 0.01 |" in found.text
    assert "| decisions made again in full precision | 0 |" in found.text
    assert "| task |" not in found.text
    assert "Heads share keys: yes" in found.text


def test_margins():
    made = circuit("input->m0", "m0->logits", "a0.h0->m0")
    made.scores[GRAPH.edge("input->m0")] = 0.01 + 4e-7
    made.scores[GRAPH.edge("m0->logits")] = -0.02
    made.scores[GRAPH.edge("a0.h0->m0")] = -0.01
    with pytest.raises(ValueError, match="circuit: expected a threshold"):
        made.min_margin  # noqa: B018
    made.provenance["threshold"] = 0.01
    assert made.min_margin == pytest.approx(4e-7, rel=2e-3)
    assert [*made.ambiguous_edges()] == ["input->m0"]
    assert float(made.margins[GRAPH.edge("m0->logits")]) == pytest.approx(0.03)
    assert made.margins[GRAPH.edge("input->logits")].isnan()
    made.provenance["absolute"] = True
    assert sorted(made.ambiguous_edges()) == ["a0.h0->m0", "input->m0"]
    assert sorted(made.ambiguous_edges(0.011)) == ["a0.h0->m0", "input->m0", "m0->logits"]
    nothing = circuit()
    nothing.provenance["threshold"] = 1.0
    assert nothing.min_margin == math.inf


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
