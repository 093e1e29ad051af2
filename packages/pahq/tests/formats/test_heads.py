"""Shared receivers of keys and values, and separate ones."""

import pytest
import torch
from pahq import Circuit, Graph
from pahq.formats import grouped, per_query_head

GRAPH = Graph(3, 6, 2)


def circuit(graph, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shape = (graph.senders, graph.receivers)
    scores = torch.randn(shape, generator=draws)
    scores[torch.rand(shape, generator=draws) < 0.3] = float("nan")
    present = torch.rand(shape, generator=draws) < 0.4
    return Circuit(graph, present, scores, {"method": "acdc"})


def same(a, b):
    assert a.graph == b.graph
    assert torch.equal(a.present, b.present)
    edges = torch.from_numpy(a.graph.full())
    torch.testing.assert_close(a.scores[edges], b.scores[edges], rtol=0, atol=0, equal_nan=True)


def test_an_edge_into_shared_keys_becomes_one_for_each_head():
    present = torch.zeros(GRAPH.senders, GRAPH.receivers, dtype=torch.bool)
    scores = torch.full(present.shape, float("nan"))
    place = GRAPH.edge("a0.h5->a2.kv1<k>")
    present[place], scores[place] = True, 0.25
    for name in ("m0->a1.h4<q>", "input->m2", "m2->logits"):
        present[GRAPH.edge(name)] = True
    wide = per_query_head(Circuit(GRAPH, present, scores, {"method": "acdc"}))
    assert wide.graph == Graph(3, 6, 6)
    heads = [f"a0.h5->a2.h{head}<k>" for head in (3, 4, 5)]
    assert set(wide.edges()) == {"m0->a1.h4<q>", "input->m2", "m2->logits", *heads}
    assert all(wide.scores[wide.graph.edge(name)] == 0.25 for name in heads)
    assert wide.scores[wide.graph.edge("a0.h5->a2.h2<k>")].isnan()
    assert wide.provenance == {"method": "acdc"}


@pytest.mark.parametrize(
    "graph", [GRAPH, Graph(2, 4, 1), Graph(2, 3, 3), Graph(3, 4, 2, parallel=True)]
)
def test_there_and_back(graph):
    made = circuit(graph)
    found = grouped(per_query_head(made), graph.key_heads)
    same(made, found)
    assert found.provenance == made.provenance


def test_a_shared_edge_is_there_if_any_is_and_has_the_largest_score():
    wide = Graph(2, 4, 4)
    present = torch.zeros(wide.senders, wide.receivers, dtype=torch.bool)
    scores = torch.full(present.shape, float("nan"))
    for name, score in (("m0->a1.h0<v>", 0.5), ("m0->a1.h1<v>", -2.0), ("m0->a1.h2<v>", -1.0),
                        ("m0->a1.h3<v>", 1.0)):  # fmt: skip
        scores[wide.edge(name)] = score
    present[wide.edge("m0->a1.h0<v>")] = True
    found = grouped(Circuit(wide, present, scores), 2)
    assert [*found.edges()] == ["m0->a1.kv0<v>"]
    assert found.scores[found.graph.edge("m0->a1.kv0<v>")] == -2
    # the first of equals
    assert found.scores[found.graph.edge("m0->a1.kv1<v>")] == -1
    assert found.scores[found.graph.edge("m0->a1.kv1<k>")].isnan()


def test_bad_input():
    with pytest.raises(ValueError, match="circuit: expected 6 receivers of keys, got int 2"):
        grouped(circuit(GRAPH), 2)
    with pytest.raises(ValueError, match="key_heads: expected a divisor of heads=6"):
        grouped(per_query_head(circuit(GRAPH)), 4)
