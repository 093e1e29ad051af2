"""Published circuits: what papers say of them, counted."""

import pytest
import torch
from pahq import CircuitFinder, Graph, Task
from pahq.evaluation import auc_roc
from pahq.truth import canonical
from transformers import GPT2Config, GPT2LMHeadModel

GPT2, ATTN = Graph(12, 12, 12), Graph(4, 8, 8)
MADE = [
    (canonical.ioi, {}, GPT2), (canonical.ioi, {"mlps": True}, GPT2),
    (canonical.greater_than, {}, GPT2), (canonical.docstring, {}, ATTN),
]  # fmt: skip


def heads_of(circuit):
    """Every head that an edge leaves or enters."""
    names = {end.split("<")[0] for edge in circuit.edges() for end in edge.split("->")}
    return {name for name in names if name[0] == "a"}


def read(circuit, receiver):
    return {edge.split("->")[0] for edge in circuit.edges() if edge.endswith(f"->{receiver}")}


def test_heads_of_ioi():
    sizes = [len(heads) for heads in canonical.IOI_GROUPS.values()]
    assert sorted(sizes) == [2, 2, 3, 3, 4, 4, 8]
    every = [head for heads in canonical.IOI_GROUPS.values() for head in heads]
    assert len(set(every)) == 26
    for mlps in (False, True):
        assert heads_of(canonical.ioi(GPT2, mlps=mlps)) == set(every)
    assert len(canonical.IOI_CONNECTIONS) == len(set(canonical.IOI_CONNECTIONS)) == 15


def test_edges_of_ioi():
    """As many as the sizes of the groups make, which no edge is left out of for its order."""
    circuit = canonical.ioi(GPT2)
    size = {name: len(heads) for name, heads in canonical.IOI_GROUPS.items()}
    size |= {"input": 1, "logits": 1}
    total = sum(
        size[first] * size[second] * max(1, len(parts))
        for first, second, parts in canonical.IOI_CONNECTIONS
    )
    assert len(circuit) == total == 182
    assert read(circuit, "a9.h9<q>") == {"a7.h3", "a7.h9", "a8.h6", "a8.h10"}
    assert read(circuit, "a9.h9<v>") == {"input"}
    assert read(circuit, "a5.h5<k>") == {"a2.h2", "a4.h11"}
    assert read(circuit, "a5.h5<q>") == set()
    assert read(circuit, "a8.h6<v>") == {
        "a0.h1", "a0.h10", "a3.h0", "a5.h5", "a5.h8", "a5.h9", "a6.h9",
    }  # fmt: skip
    assert "a10.h7" in read(circuit, "logits")
    assert "a7.h3" not in read(circuit, "logits")


def test_mlps_of_ioi():
    """Those of Conmy et al.: nothing from head to head is added."""
    whole, heads = canonical.ioi(GPT2, mlps=True), canonical.ioi(GPT2)
    assert not len(heads - whole)
    added = [edge.split("->") for edge in (whole - heads).edges()]
    assert all("m" in first or "m" in second or first == "input" for first, second in added)
    assert read(whole, "m3") == {"input", "m0", "m1", "m2", "a0.h1", "a0.h10", "a2.h2", "a3.h0"}
    assert read(whole, "a5.h5<q>") == {"m0", "m1", "m2", "m3", "m4"}


def test_edges_of_greater_than():
    circuit = canonical.greater_than(GPT2)
    assert heads_of(circuit) == {
        "a0.h1", "a0.h3", "a0.h5", "a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1",
    }  # fmt: skip
    early = {"a0.h1", "a0.h3", "a0.h5", "m0", "m1", "m2", "m3"}
    assert read(circuit, "a7.h10<v>") == early
    assert read(circuit, "a7.h10<q>") == early | {"m4", "m5", "m6"}
    # a head of a layer acts on its MLP, and no MLP on a head of its layer
    assert read(circuit, "m8") >= {"a8.h11"}
    assert "m8" not in read(circuit, "a8.h11<q>")
    assert read(circuit, "logits") == {
        "a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1", "m8", "m9", "m10", "m11",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "graph", "edges", "published"),
    [(*made, *counts) for made, counts in zip(
        MADE[1:], [(963, 1041), (235, 262), (24, 37)], strict=True)],
)  # fmt: skip
def test_edges_are_as_many_as_conmy_et_al_count(make, options, graph, edges, published):
    """They count the direct edge of each query, key and value that is read, too."""
    circuit = make(graph, **options)
    assert len(circuit) == edges
    direct = {edge.split("->")[1] for edge in circuit.edges() if edge.endswith(">")}
    assert edges + len(direct) == published


@pytest.mark.parametrize(("make", "options", "graph"), MADE)
def test_names_and_scores(make, options, graph):
    circuit = make(graph, **options)
    for name in circuit.edges():
        graph.edge(name)
    assert torch.equal(circuit.scores, circuit.present.float())
    assert circuit.provenance["method"] == "published"
    for nodes in circuit.provenance["groups"].values():
        assert set(nodes) <= set(graph.sender_names)


@pytest.mark.parametrize(("make", "options", "graph"), MADE)
def test_areas(make, options, graph):
    truth = make(graph, **options)
    assert auc_roc(truth, truth, mode="trapezoid").area == 1
    scored = make(graph, **options)
    scored.present = torch.from_numpy(graph.full())
    scored.scores = -scored.scores
    assert auc_roc(scored, truth, absolute=False).area == 0


@pytest.mark.parametrize("make", [canonical.ioi, canonical.greater_than, canonical.docstring])
@pytest.mark.parametrize(
    "graph", [Graph(12, 12, 4), Graph(24, 16, 16), Graph(12, 12, 12, parallel=True)]
)
def test_another_graph(make, graph):
    with pytest.raises(ValueError, match=r"graph: expected that of .* found in that model"):
        make(graph)


def test_a_model_of_that_shape_runs_it():
    draws = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(96, (2, 2, 6), generator=draws)
    last = torch.full((2,), 5)
    task = Task(clean, corrupted, last, torch.tensor([5, 6]), torch.tensor([20, 21]))
    config = GPT2Config(n_layer=12, n_head=12, n_embd=48, n_positions=32, vocab_size=96)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        finder = CircuitFinder(GPT2LMHeadModel(config).eval())
    kl = [
        finder.evaluate(circuit, task, ["kl"])["kl"]["circuit"]
        for circuit in (canonical.ioi(finder.graph), canonical.ioi(finder.graph, mlps=True))
    ]
    assert kl[0] > kl[1] > 0
