"""Planted circuits: that they are the circuit, and that ACDC finds them."""

import pytest
import torch
from pahq import Circuit, CircuitFinder, Graph
from pahq.evaluation import auc_roc
from pahq.truth import BAND, plant, wire
from pahq.truth.wiring import sources_of
from transformers import AutoModelForCausalLM

MODELS = [("gpt2", Graph(2, 4, 4)), ("llama", Graph(2, 4, 2)), ("llama", Graph(3, 4, 1))]
CASES = [(family, graph, seed) for family, graph in MODELS for seed in range(3)]


def planted(family, graph, seed, **options):
    edges = wire(graph, heads=4, mlps=min(2, graph.layers), seed=seed)
    return plant(graph, edges, family=family, seed=seed, **options)


@pytest.mark.parametrize(("family", "graph", "seed"), CASES)
def test_acdc_finds_the_circuit(family, graph, seed):
    made = planted(family, graph, seed)
    finder, task = CircuitFinder(made.model), made.task()
    assert finder.graph == graph
    assert 6 < len(made.circuit) < graph.edges / 4
    for threshold in BAND:
        found = finder.acdc(task, threshold, progress=False)
        # precision and recall are 1
        assert [*(found - made.circuit).edges()] == []
        assert [*(made.circuit - found).edges()] == []


@pytest.mark.parametrize(("family", "graph"), MODELS)
def test_only_edges_of_the_circuit_matter(family, graph):
    made = planted(family, graph, 0)
    finder, task = CircuitFinder(made.model), made.task()
    full = torch.from_numpy(graph.full())
    effects = finder.edge_effects(task, progress=False).scores
    inside = made.circuit.present
    assert float(effects[inside].min()) > BAND[1]
    assert float(effects[full & ~inside].abs().max()) < BAND[0]
    logits = {
        name: finder.run(Circuit(graph, present, effects), task.clean, task.corrupted)[:, -1]
        for name, present in (
            ("all", full), ("circuit", inside), ("none", full & False), ("rest", full & ~inside),
        )
    }  # fmt: skip
    spread = float((logits["all"] - logits["none"]).abs().max())
    assert spread > 0.5
    for a, b in (("all", "circuit"), ("none", "rest")):
        assert float((logits[a] - logits[b]).abs().max()) < 1e-3 * spread


@pytest.mark.parametrize(("family", "graph"), MODELS)
def test_what_is_outside_runs_and_differs(family, graph):
    """Heads and MLPs that do not matter are not idle, or nothing would be left to tell apart."""
    made = planted(family, graph, 0)
    finder, task = CircuitFinder(made.model), made.task()
    clean, corrupted = (finder.executor.plain(ids) for ids in (task.clean, task.corrupted))
    moved = (clean.senders - corrupted.senders)[:, :, -1].norm(dim=-1).mean(-1)
    assert float(moved.min()) > 0.1
    # and what they write is read: each head outside has every part of its input changed
    read = (clean.attention - corrupted.attention)[:, :, -1].norm(dim=-1).mean(-1)
    assert float(read.min()) > 0.5
    outside = made.circuit.present.any(1).logical_not()
    assert int(outside.sum()) > 2


def test_edges_that_share_keys_but_not_heads():
    """Two heads of a group, of which one reads a query of its own and the other none."""
    graph = Graph(2, 4, 2)
    edges = [
        "input->a0.kv0<v>", "a0.h0->a1.kv1<v>", "input->a1.kv1<k>", "a0.h0->a1.h2<q>",
        "a1.h2->logits", "a1.h3->logits", "input->logits",
    ]  # fmt: skip
    made = plant(graph, edges, seed=3)
    assert sorted(made.circuit.edges()) == sorted(edges)
    found = CircuitFinder(made.model).acdc(made.task(), BAND[1], progress=False)
    assert sorted(found.edges()) == sorted(edges)


@torch.no_grad()
def test_heads_look_at_content_and_nothing_else():
    """Neither at junk, nor at how far away a token is."""
    edges = [
        "input->a0.kv0<v>", "a0.h0->logits",
        "input->a0.kv1<v>", "input->a0.kv1<k>", "input->a0.h2<q>", "a0.h2->logits",
    ]  # fmt: skip
    made = plant(Graph(1, 4, 2), edges, dtype=torch.float64)
    adapter = CircuitFinder(made.model).adapter

    def pattern(head, ids):
        x = adapter.embed(ids)[None]
        q = adapter.part(0, "q", [head], x)
        k = adapter.part(0, "k", [head // 2], x)
        # values that tell tokens apart: what is read is the weight of each
        return adapter.attend(0, q, k, torch.eye(ids.shape[1], dtype=torch.float64))[0, 0, -1]

    ids = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(0))
    even = torch.full((48,), 1 / 48, dtype=torch.float64)
    torch.testing.assert_close(pattern(0, ids), even, rtol=1e-12, atol=0)
    assert float(pattern(2, ids).max()) > 1.1 / 48
    torch.testing.assert_close(pattern(2, torch.full_like(ids, 7)), even, rtol=1e-4, atol=0)


def test_scores_by_gradients_tell_it_from_the_rest():
    made = planted("llama", Graph(2, 4, 2), 1)
    scores = CircuitFinder(made.model).eap(made.task(), metric="kl", ig_steps=5)
    assert auc_roc(scores, made.circuit).area > 0.99
    assert auc_roc(made.circuit, made.circuit).area == 1


def test_models_are_ordinary_ones(tmp_path):
    for family, graph in MODELS[:2]:
        made = planted(family, graph, 0)
        assert made.model.config.model_type == family
        assert not made.model.training
        assert made.model.dtype == torch.float32
        made.model.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        ids = made.task(4).clean
        with torch.no_grad():
            logits = [m(input_ids=ids, use_cache=False).logits for m in (made.model, again)]
        assert torch.equal(*logits)


def test_seeds():
    graph = Graph(2, 4, 2)
    edges = wire(graph, heads=3, mlps=1)
    state = torch.get_rng_state()
    models = [plant(graph, edges, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    weights = [m.model.state_dict() for m in models]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
    assert not torch.equal(*(w["lm_head.weight"] for w in weights[1:]))
    a, b, c = (models[0].task(4, seed=seed).fingerprint for seed in (0, 0, 1))
    assert a == b != c


def test_tasks():
    made = planted("gpt2", Graph(2, 4, 4), 0, dtype=torch.float64)
    assert made.model.dtype == torch.float64
    task = made.task(5, length=6)
    assert task.clean.shape == task.corrupted.shape == (5, 6)
    assert task.positions.tolist() == [5] * 5
    judged = CircuitFinder(made.model).evaluate(made.circuit, task)["logit_diff"]
    assert judged["none"] > judged["all"] + 2
    with torch.no_grad():
        clean, corrupted = (
            made.model(input_ids=ids, use_cache=False).logits[:, -1]
            for ids in (task.clean, task.corrupted)
        )
    raised = clean - corrupted
    assert torch.equal(raised.max(1).indices, task.answers)
    assert torch.equal(raised.min(1).indices, task.wrong_answers)
    for options in ({"n": 0}, {"length": 0}, {"length": 65}):
        with pytest.raises(ValueError, match="an integer in"):
            made.task(**options)


@pytest.mark.parametrize("graph", [graph for _, graph in MODELS])
def test_wired_circuits_have_no_idle_part(graph):
    for seed in range(50):
        for heads, mlps in ((0, 1), (1, 0), (4, 2), (7, 1)):
            edges = wire(graph, heads=heads, mlps=mlps, seed=seed)
            assert len(edges) == len(set(edges))
            assert edges == wire(graph, heads=heads, mlps=mlps, seed=seed)
            sources = sources_of(graph, edges)
            senders = {s for found in sources.values() for s in found} - {0}
            of_mlps = [s for s in senders if s % (graph.heads + 1) == 0]
            assert (len(senders) - len(of_mlps), len(of_mlps)) == (heads, mlps)
            # all parts of it reach the logits
            present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
            for receiver, found in sources.items():
                present[found, receiver] = True
            reached = {graph.logits}
            for receiver in sorted(sources, reverse=True):
                if any(present[reader, list(reached)].any() for reader in graph.readers(receiver)):
                    reached.add(receiver)
            assert reached == set(sources)


def test_wires_are_deep_and_of_all_kinds():
    graph = Graph(4, 4, 2)
    names = " ".join(name for seed in range(10) for name in wire(graph, heads=6, mlps=3, seed=seed))
    for part in ("<q>", "<k>", "<v>", "->m3", "m0->", "input->", "->logits"):
        assert part in names
    single = wire(graph, heads=6, mlps=3, sources=1)
    receivers = [name.split("->")[1] for name in single if "logits" not in name]
    assert len(receivers) == len(set(receivers))


@pytest.mark.parametrize(("edges", "reason"), [
    (["input->a0.kv0<v>"], "expected some that reach the logits"),
    (["a0.h0->logits"], r"'a0.h0->logits'; there is no edge into a0.kv0<v>"),
    (["m1->logits"], "there is no edge into m1"),
    (["input->logits", "input->m0"], r"'input->m0'; there is nothing reads m0"),
    (["input->logits", "input->a0.h1<q>"], "nothing reads a0.h1<q>"),
    (["input->a0.kv0<v>", "a0.h0->logits", "input->a0.h0<q>"], "no edge into a0.kv0<k>"),
    (["input->a0.kv0<v>", "a0.h0->logits", "input->a0.h1<q>"], "nothing reads a0.h1<q>"),
    (["input->a0.kv0<v>", "a0.h0->logits", "input->a0.kv1<k>"], "nothing reads a0.kv1<k>"),
    (["m1->m0"], "edge: expected an edge of this model"),
])  # fmt: skip
def test_idle_edges_are_refused(edges, reason):
    with pytest.raises(ValueError, match=reason):
        plant(Graph(2, 4, 2), edges)


def test_bad_input():
    graph, edges = Graph(2, 4, 4), ["input->logits"]
    with pytest.raises(ValueError, match="width: expected a multiple of 8, got int 36"):
        plant(graph, edges, width=36)
    with pytest.raises(ValueError, match="width: expected at least 9, got int 4"):
        plant(Graph(1, 2, 2), ["input->logits"], family="gpt2", width=4)
    with pytest.raises(ValueError, match="family: expected one of gpt2, llama"):
        plant(graph, edges, family="opt")
    with pytest.raises(ValueError, match="GPT-2 has no grouped keys"):
        plant(Graph(2, 4, 2), edges, family="gpt2")
    with pytest.raises(ValueError, match="graph: expected MLPs after heads"):
        plant(Graph(2, 4, 4, parallel=True), edges)
    with pytest.raises(ValueError, match="dtype: expected float32 or float64"):
        plant(graph, edges, dtype=torch.bfloat16)
    for options in ({"heads": 9, "mlps": 0}, {"heads": 0, "mlps": 3}, {"heads": -1, "mlps": 1}):
        with pytest.raises(ValueError, match="an integer in"):
            wire(graph, **options)
    with pytest.raises(ValueError, match="heads: expected a head or an MLP"):
        wire(graph, heads=0, mlps=0)
