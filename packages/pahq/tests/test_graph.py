"""Numbers, names and order of the edges."""

import numpy as np
import pytest
from pahq import Graph


@pytest.mark.parametrize(("sizes", "edges"), [
    # GPT-2 small, SmolLM2-135M grouped and not, Qwen2.5-0.5B, Llama-3.2-1B, Llama-3.1-8B
    ((12, 12, 12), 32_491), ((30, 9, 3), 70_651), ((30, 9, 9), 123_211), ((24, 14, 2), 79_813),
    ((24, 14, 14), 179_749), ((16, 32, 8), 195_865), ((32, 32, 8), 805_681),
    ((32, 32, 32), 1_592_881),
])  # fmt: skip
def test_numbers_of_edges(sizes, edges):
    graph = Graph(*sizes)
    assert graph.edges == edges
    if edges < 100_000:
        assert int(graph.full().sum()) == edges


@pytest.mark.parametrize("graph", [Graph(3, 4, 2), Graph(2, 3, 3), Graph(2, 4, 1, parallel=True)])
def test_names_and_numbers_go_both_ways(graph):
    assert len(graph.sender_names) == len(set(graph.sender_names)) == graph.senders
    assert len(graph.receiver_names) == len(set(graph.receiver_names)) == graph.receivers
    for sender, receiver in np.argwhere(graph.full()).tolist():
        assert graph.edge(graph.name(sender, receiver)) == (sender, receiver)
    for receiver in range(graph.receivers):
        layer, part, index = graph.place(receiver)
        if part != "logits":
            assert graph.columns(layer, part).start + index == receiver
            assert all(s >= graph.upstream(receiver) for s in graph.readers(receiver))
    assert graph.place(graph.logits) == (graph.layers, "logits", 0)


def test_what_comes_before_what():
    graph = Graph(2, 2, 1)
    assert graph.receiver_names == [
        "a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "m0",
        "a1.h0<q>", "a1.h1<q>", "a1.kv0<k>", "a1.kv0<v>", "m1", "logits",
    ]  # fmt: skip
    sees = lambda name: graph.sender_names[: graph.upstream(graph.receiver_names.index(name))]  # noqa: E731
    assert sees("a0.kv0<v>") == ["input"]
    assert sees("m0") == ["input", "a0.h0", "a0.h1"]
    assert sees("a1.h1<q>") == ["input", "a0.h0", "a0.h1", "m0"]
    assert sees("logits") == graph.sender_names
    assert Graph(2, 2, 1, parallel=True).upstream(4) == 1
    assert [graph.sender_names[s] for s in graph.readers(7)] == ["a1.h0", "a1.h1"]
    assert graph.readers(graph.logits) == []


def test_order_is_that_of_acdc():
    graph = Graph(2, 2, 2)
    names = [graph.receiver_names[r] for r in graph.order()]
    assert names[:8] == [
        "logits", "m1", "a1.h1<v>", "a1.h0<v>", "a1.h1<k>", "a1.h0<k>", "a1.h1<q>", "a1.h0<q>",
    ]  # fmt: skip
    assert sorted(names) == sorted(graph.receiver_names)
    nearest = [graph.sender_names[s] for s in graph.candidates(graph.logits)]
    assert nearest == ["m1", "a1.h1", "a1.h0", "m0", "a0.h1", "a0.h0", "input"]


def test_bad_input():
    with pytest.raises(ValueError, match="key_heads: expected a divisor of heads=4"):
        Graph(2, 4, 3)
    with pytest.raises(ValueError, match="layers"):
        Graph(0, 4, 2)
    graph = Graph(2, 4, 2)
    for name in ("m1->m0", "m0->m0", "a0.h9->m1", "a0.h0->a1.h0", "m0", "logits->m1", ""):
        with pytest.raises(ValueError, match="edge: expected an edge of this model"):
            graph.edge(name)
