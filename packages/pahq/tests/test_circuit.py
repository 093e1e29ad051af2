"""Sets of edges, and files."""

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
