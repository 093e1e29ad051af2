"""Patched runs by their definition, and ACDC against the sequential algorithm."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pahq import Circuit, CircuitFinder, Graph, Task, UnsupportedModelError
from pahq.acdc import Acdc
from pahq.batches import Settings
from pahq.current import NARROW, WIDE
from pahq.metrics import Metric
from shared_kernels.testing.models import tiny_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import circuit_of, exact, lively, logits, pairs

FAMILIES = ["llama", "qwen3", "mistral", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("kv", ["grouped", "per_query_head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_are_the_model_and_none_the_corrupted_run(name, kv):
    model, task = lively(name), pairs(size=20)
    finder = CircuitFinder(model, kv=kv)
    full = torch.from_numpy(finder.graph.full())
    for present, ids in ((full, task.clean), (torch.zeros_like(full), task.corrupted)):
        found = finder.run(circuit_of(finder.graph, present), task.clean, task.corrupted)
        torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gpt_neox_with_mlps_beside_or_behind_heads(together, share):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    config = GPTNeoXConfig(**shape, use_parallel_residual=together, rope_parameters=rope)
    model = GPTNeoXForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    finder, task = CircuitFinder(model), pairs()
    assert finder.graph.parallel is together
    for ids, present in ((task.clean, finder.graph.full()), (task.corrupted, None)):
        edges = torch.zeros(finder.graph.senders, finder.graph.receivers).bool()
        edges = edges if present is None else torch.from_numpy(present)
        found = finder.run(circuit_of(finder.graph, edges), task.clean, task.corrupted)
        torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=1e-11)


def literally(finder, present, clean, corrupted):
    """Final states by recursion: every receiver is put together from its senders' own values."""
    graph, adapter = finder.graph, finder.adapter
    plain = finder.executor.plain(corrupted)

    def sender(number):
        if number == 0:
            return adapter.embed(clean)
        layer, place = divmod(number - 1, graph.heads + 1)
        if place == graph.heads:
            return adapter.mlp(layer, receiver(graph.columns(layer, "mlp").start))
        group = place // (graph.heads // adapter.key_heads)
        index = {"q": place, "k": place // graph.group, "v": place // graph.group}
        parts = [
            adapter.part(
                layer, part, [place if part == "q" else group],
                receiver(graph.columns(layer, part).start + index[part])[None],
            )
            for part in "qkv"
        ]  # fmt: skip
        return adapter.write(layer, [place], adapter.attend(layer, *parts))[0]

    def receiver(number):
        x = plain.read(graph, number)
        for s in range(graph.upstream(number)):
            if present[s, number]:
                x = x + sender(s) - plain.senders[s]
        return x

    with torch.no_grad():
        return receiver(graph.logits)


@pytest.mark.parametrize("kv", ["grouped", "per_query_head"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gpt_neox"])
def test_circuits_are_what_recursion_says(name, kv):
    model, task = lively(name), pairs(n=2, size=6)
    finder = CircuitFinder(model, kv=kv)
    random = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8):
        present = finder.graph.full() & (random.random(finder.graph.full().shape) < share)
        present = torch.from_numpy(present)
        base = finder.executor.plain(task.corrupted)
        found = finder.executor.run(present, task.clean, base).final
        wanted = literally(finder, present, task.clean, task.corrupted)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_grouped_edges_are_those_of_all_heads_of_the_group():
    model, task = lively("llama"), pairs()
    grouped, apart = CircuitFinder(model), CircuitFinder(model, kv="per_query_head")
    random = np.random.default_rng(1)
    present = grouped.graph.full() & (random.random(grouped.graph.full().shape) < 0.5)
    wide = np.zeros((apart.graph.senders, apart.graph.receivers), dtype=bool)
    for receiver in range(apart.graph.receivers):
        layer, part, index = apart.graph.place(receiver)
        if part == "logits":
            source = grouped.graph.logits
        else:
            first = grouped.graph.columns(layer, part).start
            source = first + (index // grouped.graph.group if part in "kv" else index)
        wide[:, receiver] = present[:, source]
    found = [
        finder.run(circuit_of(finder.graph, torch.from_numpy(p)), task.clean, task.corrupted)
        for finder, p in ((grouped, present), (apart, wide))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


def sequential(finder, task, metric, threshold, absolute=False, skip=True):
    """ACDC one edge and one whole run at a time."""
    graph, executor = finder.graph, finder.executor
    base = executor.plain(task.corrupted)
    measure = Metric(metric, finder.adapter, task, executor.plain(task.clean).final)
    value = lambda present: float(measure(executor.run(present, task.clean, base).final[None])[0])  # noqa: E731
    present = torch.from_numpy(graph.full())
    now, effects = value(present), {}
    for receiver in graph.order():
        reached, alive = set(), {graph.logits}
        for r in reversed(range(graph.receivers)):
            if r == graph.logits or reached & set(graph.readers(r)):
                alive.add(r)
                reached |= set(present[:, r].nonzero()[:, 0].tolist())
        if skip and receiver not in alive:
            present[:, receiver] = False
            continue
        for sender in graph.candidates(receiver):
            present[sender, receiver] = False
            after = value(present)
            effect = effects[sender, receiver] = after - now
            if (abs(effect) if absolute else effect) < threshold:
                now = after
            else:
                present[sender, receiver] = True
    return present, now, effects


@pytest.mark.parametrize(("name", "kv"), [
    ("llama", "grouped"), ("llama", "per_query_head"), ("qwen3", "grouped"), ("gpt2", "grouped"),
    ("gpt_neox", "grouped"),
])  # fmt: skip
def test_decisions_are_those_of_the_sequential_algorithm(name, kv):
    model, task = lively(name), pairs()
    finder = CircuitFinder(model, kv=kv)
    kept = []
    for metric, threshold, absolute in (
        ("kl", 1e-4, False), ("kl", 2e-3, False), ("logit_diff", 1e-2, True),
    ):  # fmt: skip
        present, value, effects = sequential(finder, task, metric, threshold, absolute)
        kept.append(int(present.sum()))
        for rows in (1, 2, 7, 64):
            found = finder.acdc(task, threshold, metric=metric, absolute=absolute, max_rows=rows,
                                progress=False)  # fmt: skip
            assert torch.equal(found.present, present)
            assert found.provenance["value"] == pytest.approx(value, abs=1e-11)
            tried = {tuple(e) for e in (~found.scores.isnan()).nonzero().tolist()}
            assert tried == set(effects)
            for edge, effect in effects.items():
                assert float(found.scores[edge]) == pytest.approx(effect, rel=1e-5, abs=1e-11)
            assert found.provenance["skipped"] == finder.graph.edges - len(effects)
    assert 0 < min(kept) < max(kept) < finder.graph.edges


def test_edges_that_nothing_reads_have_no_effect():
    finder, task = CircuitFinder(lively("gpt2")), pairs()
    present, value, effects = sequential(finder, task, "kl", 2e-2)
    without, same, all_effects = sequential(finder, task, "kl", 2e-2, skip=False)
    assert torch.equal(present, without)
    assert same == pytest.approx(value, abs=1e-12)
    skipped = [effect for edge, effect in all_effects.items() if edge not in effects]
    assert len(skipped) > 50
    assert max(map(abs, skipped)) < 1e-12


@pytest.mark.parametrize(("name", "tau"), [("qwen3", 2e-2), ("gpt2", 2e-3), ("gpt_neox", 5e-3)])
def test_the_current_run_afterwards_is_that_of_the_circuit(name, tau, monkeypatch):
    finder, task = CircuitFinder(lively(name)), pairs()
    current, measure = finder._begin(task, "kl", "patch")
    search = Acdc(current, measure, tau, Settings(rows=8))
    # without what is computed anew at the end of a layer
    monkeypatch.setattr(current, "compute", lambda first: None)
    for layer in reversed(range(finder.graph.layers + 1)):
        search.layer(layer)
    base = finder.executor.plain(task.corrupted)
    again = finder.executor.run(current.present, task.clean, base)
    rows = torch.arange(len(task))
    final = again.final[rows, task.positions]
    torch.testing.assert_close(current.input(finder.graph.logits), final, rtol=0, atol=1e-11)
    kinds = set()
    for sender, need in enumerate(current.needs):
        wanted = again.senders[sender] - base.senders[sender]
        # embeddings are no layer's
        assert need == WIDE or sender == 0 or current.moved[sender] is None
        if need == NARROW:
            found, wanted = current.answers[sender], wanted[rows, task.positions]
        elif need:
            found = current.moved[sender].view_as(wanted)
            assert torch.equal(current.answers[sender], found[rows, task.positions])
        if need:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
            kinds.add(int(need))
    assert kinds == {NARROW, WIDE}
    assert search.found.rows < 4 * search.found.tested


def test_evaluation():
    finder, task = CircuitFinder(lively("llama")), pairs()
    full = torch.from_numpy(finder.graph.full())
    names = ("kl", "logit_diff", "prob_diff", "nll")
    everything = finder.evaluate(circuit_of(finder.graph, full), task, names)
    nothing = finder.evaluate(circuit_of(finder.graph, torch.zeros_like(full)), task, names)
    for name in names:
        assert everything[name]["recovered"] == pytest.approx(1)
        assert nothing[name]["recovered"] == pytest.approx(0, abs=1e-9)
        assert everything[name]["circuit"] == pytest.approx(everything[name]["all"], abs=1e-12)
    assert everything["kl"]["all"] == 0
    found = finder.acdc(task, 2e-2, progress=False)
    judged = finder.evaluate(found, task)
    assert judged["kl"]["circuit"] == pytest.approx(found.provenance["value"], abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_metrics(name):
    model, task = lively(name), pairs()
    finder = CircuitFinder(model)
    clean, other = (finder.executor.plain(ids).final for ids in (task.clean, task.corrupted))
    rows = torch.arange(3)
    p, q = (logits(model, ids)[rows, task.positions] for ids in (task.clean, task.corrupted))
    both = torch.stack([clean, other])
    measure = lambda metric: Metric(metric, finder.adapter, task, clean)(both).tolist()  # noqa: E731
    law, also = p.softmax(-1), q.softmax(-1)
    kl = (law * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert measure("kl") == pytest.approx([0, float(kl)], abs=1e-12)
    gap = lambda x: -float((x[rows, task.answers] - x[rows, task.wrong_answers]).mean())  # noqa: E731
    assert measure("logit_diff") == pytest.approx([gap(p), gap(q)], abs=1e-11)
    assert measure("prob_diff") == pytest.approx([gap(law), gap(also)], abs=1e-12)
    nll = [-float(x.log_softmax(-1)[rows, task.answers].mean()) for x in (p, q)]
    assert measure("nll") == pytest.approx(nll, abs=1e-11)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_kl_near_zero(size):
    """In float32, against float64: differences of logarithms would lose all digits."""
    model, task = lively("llama"), pairs()
    exact = CircuitFinder(model)
    rough = CircuitFinder(copy.deepcopy(model).float())
    clean = exact.executor.plain(task.clean).final
    draws = torch.Generator().manual_seed(1)
    moved = clean + size * torch.randn(clean.shape, dtype=torch.float64, generator=draws)
    single = Metric("kl", rough.adapter, task, clean.float())
    # the same difference, rounded once
    rounded = clean.float() + (moved - clean).float()
    found = float(single(rounded[None])[0])
    base = Metric("kl", exact.adapter, task, clean.float().double())
    wanted = float(base(rounded.double()[None])[0])
    assert wanted > 0
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-13)


def test_models_that_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"one of the families .* got 'granite'"):
        CircuitFinder(tiny_model("granite").eval())
    model = tiny_model("llama").eval()
    model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: (out[0] + 1, out[1]))
    with pytest.raises(UnsupportedModelError, match="not reproduced"):
        CircuitFinder(model)
    CircuitFinder(model, check=False)
    model = tiny_model("llama").train()
    CircuitFinder(model)
    assert model.training
    with pytest.raises(UnsupportedModelError, match=r"dropout is on.* call model.eval"):
        CircuitFinder(tiny_model("gpt2").train(), check=False)


def test_qwen2_has_biases():
    config = Qwen2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model, task = exact(Qwen2ForCausalLM(config).double().eval()), pairs()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in "qkv":
                getattr(layer.self_attn, f"{part}_proj").bias.normal_()
    finder = CircuitFinder(model)
    full = circuit_of(finder.graph, torch.from_numpy(finder.graph.full()))
    found = finder.run(full, task.clean, task.corrupted)
    torch.testing.assert_close(found, logits(model, task.clean), rtol=0, atol=1e-11)


def test_weights_of_16_bits_are_widened():
    model, task = lively("llama").bfloat16(), pairs()
    rough, exact = CircuitFinder(model), CircuitFinder(copy.deepcopy(model).float())
    present = torch.from_numpy(rough.graph.full())
    present[::3] = False
    found = [
        f.run(circuit_of(f.graph, present), task.clean, task.corrupted) for f in (rough, exact)
    ]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_searches_of_models_of_16_bits(dtype):
    model, task = lively("llama").to(dtype), pairs()
    rough, exact = CircuitFinder(model), CircuitFinder(copy.deepcopy(model).float())
    for precision in ("fp32", "bf16-delta"):
        found, wanted = (
            f.acdc(task, 2e-3, precision=precision, progress=False) for f in (rough, exact)
        )
        assert torch.equal(found.present, wanted.present)


def test_bad_input():
    finder, task = CircuitFinder(lively("llama")), pairs()
    for threshold in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold: expected a positive number"):
            finder.acdc(task, threshold)
    with pytest.raises(ValueError, match="metric: expected one of"):
        finder.acdc(task, 0.1, metric="accuracy")
    with pytest.raises(ValueError, match="max_rows"):
        finder.acdc(task, 0.1, max_rows=0)
    bare = Task(task.clean, task.corrupted, task.positions, task.answers)
    with pytest.raises(ValueError, match="kl or nll without wrong answers"):
        finder.acdc(bare, 0.1, metric="logit_diff")
    other = Circuit(Graph(1, 1, 1), torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="circuit: expected edges of"):
        finder.run(other, task.clean, task.corrupted)
    with pytest.raises(ValueError, match=r"corrupted: expected shape \(3, 12\)"):
        full = circuit_of(finder.graph, torch.from_numpy(finder.graph.full()))
        finder.run(full, task.clean, task.corrupted[:, 1:])
    with pytest.raises(ValueError, match="kv: expected one of"):
        CircuitFinder(lively("llama"), kv="shared")
    with torch.no_grad():
        finder.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="metric: nan without edge m1->logits"):
        finder.acdc(task, 0.1, progress=False)
