"""Direct edges, ablations, orders, guesses, exact effects, and searches that go on."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pahq import CircuitFinder, Graph, ResumeError
from pahq.ablation import ablated, from_senders
from pahq.batches import Batches, Search, Settings
from pahq.metrics import Metric

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import circuit_of, compare, lively, logits, pairs, sequential

ABLATIONS = ("patch", "zero", "mean", "mean_positional")


# --- ablations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_run_is_what_its_senders_make(name):
    finder, task = CircuitFinder(lively(name)), pairs()
    plain = finder.executor.plain(task.corrupted)
    again = from_senders(finder.executor, plain.senders)
    for field in ("attention", "mlp", "final"):
        torch.testing.assert_close(getattr(again, field), getattr(plain, field), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_edges_under_zero_ablation_is_the_model_without_outputs(name):
    model, task = lively(name), pairs()
    finder = CircuitFinder(model)
    found = finder.run(
        circuit_of(finder.graph, torch.zeros(finder.graph.senders, finder.graph.receivers)),
        task.clean, task.corrupted, ablation="zero",
    )  # fmt: skip
    silent, handles = torch.zeros_like, []
    if name == "gpt2":
        body = model.transformer
        handles += [
            m.register_forward_hook(lambda m, a, y: silent(y)) for m in (body.wte, body.wpe)
        ]
        for block in body.h:
            # the bias of what heads write is nobody's
            bias = block.attn.c_proj.bias
            handles.append(block.attn.c_proj.register_forward_hook(
                lambda m, a, y, b=bias: silent(y) + b))  # fmt: skip
            handles.append(block.mlp.register_forward_hook(lambda m, a, y: silent(y)))
    else:
        body = model.model
        handles.append(body.embed_tokens.register_forward_hook(lambda m, a, y: silent(y)))
        for block in body.layers:
            handles.append(block.self_attn.o_proj.register_forward_hook(
                lambda m, a, y: silent(y)))  # fmt: skip
            handles.append(block.mlp.register_forward_hook(lambda m, a, y: silent(y)))
    wanted = logits(model, task.clean)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_means_are_over_what_counts():
    finder, task = CircuitFinder(lively("gpt2")), pairs()
    plain = finder.executor.plain(task.corrupted)
    ends = (task.positions + 1).tolist()
    counted = [(n, t) for n, end in enumerate(ends) for t in range(end)]
    everywhere = torch.stack([plain.senders[:, n, t] for n, t in counted], 1).mean(1)
    found = ablated(finder.executor, plain, "mean", task.positions)
    torch.testing.assert_close(
        found.senders, everywhere[:, None, None].expand_as(found.senders), rtol=0, atol=1e-12
    )
    found = ablated(finder.executor, plain, "mean_positional", task.positions)
    for t in range(max(ends)):
        there = [n for n, end in enumerate(ends) if t < end]
        wanted = plain.senders[:, there, t].mean(1)
        for n in range(len(ends)):
            torch.testing.assert_close(found.senders[:, n, t], wanted, rtol=0, atol=1e-12)
    assert ablated(finder.executor, plain, "patch", task.positions) is plain


# --- ACDC, one run for each removal --------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("name", "kv", "thresholds"), [
    ("llama", "grouped", (2e-3, 1.5e-2)), ("gpt2", "grouped", (5e-4, 4e-3)),
    ("qwen3", "per_query_head", (9e-3, 1e-1)),
])  # fmt: skip
def test_direct_edges(name, kv, thresholds, rows):
    finder, task = CircuitFinder(lively(name), kv=kv), pairs()
    for threshold in thresholds:
        wanted = sequential(finder, task, threshold, direct=True)
        assert any(effect < threshold for effect in wanted[3].values())
        assert any(effect >= threshold for effect in wanted[3].values())
        found = finder.acdc(task, threshold, direct_edges=True, max_rows=rows, progress=False)
        compare(found, wanted, finder.graph)
        assert found.provenance["tested"] == len(wanted[2])


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_ablations(name, ablation):
    finder, task = CircuitFinder(lively(name)), pairs()
    wanted = sequential(finder, task, 5e-3, ablation=ablation)
    found = finder.acdc(task, 5e-3, ablation=ablation, max_rows=7, progress=False)
    compare(found, wanted, finder.graph)
    assert found.provenance["ablation"] == ablation
    judged = finder.evaluate(found, task, ablation=ablation)
    assert judged["kl"]["circuit"] == pytest.approx(wanted[1], abs=1e-11)
    assert 0 < len(found) < finder.graph.edges


def test_ablations_differ():
    finder, task = CircuitFinder(lively("gpt2")), pairs()
    none = circuit_of(finder.graph, torch.zeros(finder.graph.senders, finder.graph.receivers))
    values = {
        name: finder.evaluate(none, task, ("kl",), ablation=name)["kl"]["circuit"]
        for name in ABLATIONS
    }
    assert len({round(value, 6) for value in values.values()}) == 4


@pytest.mark.parametrize("order", ["reverse", "shuffle"])
@pytest.mark.parametrize("direct", [False, True])
def test_other_orders(order, direct):
    finder, task = CircuitFinder(lively("qwen3")), pairs()
    wanted = sequential(finder, task, 2e-3, order=order, seed=5, direct=direct)
    found = finder.acdc(
        task, 2e-3, order=order, seed=5, direct_edges=direct, max_rows=9, progress=False
    )
    compare(found, wanted, finder.graph)
    usual = finder.acdc(task, 2e-3, progress=False)
    assert found.present.tolist() != usual.present.tolist()


# --- guesses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", ["none", "right", "wrong", "random", "kept"])
def test_guesses_change_batches_and_no_decision(guess):
    finder, task = CircuitFinder(lively("llama")), pairs()
    wanted = sequential(finder, task, 2e-3)
    truth = wanted[0]
    draws = torch.Generator().manual_seed(0)
    guesses = {
        "none": None,
        "right": truth,
        "wrong": ~truth,
        "random": torch.rand(truth.shape, generator=draws) < 0.5,
        "kept": torch.ones_like(truth),
    }
    expect = guesses[guess]
    if expect is not None:
        expect = circuit_of(finder.graph, expect)
    found = finder.acdc(task, 2e-3, expect=expect, max_rows=8, progress=False)
    compare(found, wanted, finder.graph)
    if guess == "right":
        tested = len(wanted[2])
        groups = len({receiver for _, receiver in wanted[2]})
        assert found.provenance["rows"] == tested
        assert found.provenance["batches"] <= tested / 8 + groups
        plain = finder.acdc(task, 2e-3, max_rows=8, progress=False)
        assert found.provenance["batches"] < plain.provenance["batches"]


# --- exact effects -------------------------------------------------------------------------------


def test_exact_effects_are_those_of_each_edge_alone():
    finder, task = CircuitFinder(lively("gpt2")), pairs()
    base = finder.executor.plain(task.corrupted)
    measure = Metric("kl", finder.adapter, task, finder.executor.plain(task.clean).final)
    found = finder.edge_effects(task, max_rows=5, progress=False)
    assert len(found) == finder.graph.edges
    full = torch.from_numpy(finder.graph.full())
    assert torch.equal(~found.scores.isnan(), full)
    random = np.random.default_rng(0)
    edges = full.nonzero().tolist()
    for number in random.choice(len(edges), 60, replace=False):
        sender, receiver = edges[number]
        present = full.clone()
        present[sender, receiver] = False
        value = float(measure(finder.executor.run(present, task.clean, base).final[None])[0])
        assert float(found.scores[sender, receiver]) == pytest.approx(value, rel=1e-5, abs=1e-12)


def test_exact_effects_of_some():
    finder, task = CircuitFinder(lively("llama")), pairs()
    whole = finder.edge_effects(task, progress=False)
    names = ["input->logits", "m0->a1.kv0<k>", "a1.h3->m1", "input->m0"]
    found = finder.edge_effects(task, names, metric="kl", progress=False)
    assert set(found.edges()) == set(names)
    for name in names:
        edge = finder.graph.edge(name)
        assert float(found.scores[edge]) == pytest.approx(float(whole.scores[edge]), abs=1e-12)
    assert int((~found.scores.isnan()).sum()) == 4
    with pytest.raises(ValueError, match="an edge of this model"):
        finder.edge_effects(task, ["m9->logits"])


# --- memory, and going on ------------------------------------------------------------------------


def test_memory_that_runs_out_halves_the_rows(monkeypatch, caplog):
    from pahq.suffix import Suffix

    finder, task = CircuitFinder(lively("llama")), pairs()
    wanted = finder.acdc(task, 2e-3, progress=False)
    plain = Suffix.run

    def run(suffix, given, rows, *args):
        if rows > 10:
            raise torch.OutOfMemoryError("no more")
        return plain(suffix, given, rows, *args)

    monkeypatch.setattr(Suffix, "run", run)
    found = finder.acdc(task, 2e-3, progress=False)
    assert torch.equal(found.present, wanted.present)
    assert "out of memory with 11 rows: goes on with 5 rows" in caplog.text
    monkeypatch.setattr(
        Suffix, "run", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(MemoryError, match="one row does not fit"):
        finder.acdc(task, 2e-3, progress=False)


def test_rows_keep_to_a_budget():
    finder, task = CircuitFinder(lively("llama")), pairs()
    wanted = finder.acdc(task, 2e-3, progress=False)
    batches = []
    for budget in (1, 1 << 13, 1 << 20):
        found = finder.acdc(task, 2e-3, memory_budget=budget, progress=False)
        assert torch.equal(found.present, wanted.present)
        batches.append(found.provenance["batches"])
    # one row at a time, then more and more of them
    assert batches[0] == found.provenance["tested"]
    assert batches[0] > batches[1] > batches[2] >= wanted.provenance["batches"]


@pytest.mark.parametrize("direct", [False, True])
def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch, direct):
    finder, task = CircuitFinder(lively("qwen3", layers=3)), pairs()
    options = {"direct_edges": direct, "order": "shuffle", "seed": 2, "progress": False}
    wanted = finder.acdc(task, 2e-3, **options)
    from pahq import acdc as module

    plain, seen = module.Acdc.layer, []

    def stops(search, layer):
        seen.append(layer)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(search, layer)

    monkeypatch.setattr(module.Acdc, "layer", stops)
    with pytest.raises(KeyboardInterrupt):
        finder.acdc(task, 2e-3, resume_from=tmp_path / "run", **options)
    found = finder.acdc(task, 2e-3, resume_from=tmp_path / "run", **options)
    # the layer that was begun is begun again, no other
    assert seen == [3, 2, 1, 1, 0]
    assert torch.equal(found.present, wanted.present)
    assert torch.equal(found.scores.nan_to_num(7), wanted.scores.nan_to_num(7))
    same = lambda circuit: {k: v for k, v in circuit.provenance.items() if k != "seconds"}  # noqa: E731
    assert same(found) == same(wanted)
    again = finder.acdc(task, 2e-3, resume_from=tmp_path / "run", **options)
    assert seen == [3, 2, 1, 1, 0]
    assert same(again) == same(wanted)


def test_what_was_begun_otherwise_does_not_go_on(tmp_path):
    model = lively("gpt2")
    finder, task = CircuitFinder(model), pairs()
    finder.acdc(task, 2e-3, resume_from=tmp_path / "run", progress=False)
    for other, options in (
        (task, {"threshold": 1e-3}), (task, {"threshold": 2e-3, "direct_edges": True}),
        (task, {"threshold": 2e-3, "metric": "nll"}), (pairs(seed=1), {"threshold": 2e-3}),
    ):  # fmt: skip
        with pytest.raises(ResumeError, match=r"resume_from: .* was begun with another"):
            finder.acdc(other, resume_from=tmp_path / "run", progress=False, **options)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3
    with pytest.raises(ResumeError, match="weights"):
        finder.acdc(task, 2e-3, resume_from=tmp_path / "run", progress=False)


def test_what_is_no_search_is_refused_before_work(tmp_path):
    finder, task = CircuitFinder(lively("gpt2")), pairs()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match="expected a folder"):
        finder.acdc(task, 2e-3, resume_from=tmp_path / "file", progress=False)
    finder.acdc(task, 2e-3, resume_from=tmp_path / "run", progress=False)
    path = tmp_path / "run" / "search.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ResumeError, match="is damaged"):
        finder.acdc(task, 2e-3, resume_from=tmp_path / "run", progress=False)


def test_circuits_know_their_weights():
    model = lively("gpt2")
    finder, task = CircuitFinder(model), pairs()
    found = finder.acdc(task, 2e-2, progress=False)
    assert (
        found.provenance["weights"]
        == finder.edge_effects(task, ["input->logits"], progress=False).provenance["weights"]
    )
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3
    assert (
        finder.acdc(task, 2e-2, progress=False).provenance["weights"]
        != (found.provenance["weights"])
    )


@pytest.mark.parametrize(("options", "match"), [
    ({"ablation": "noise"}, "ablation"), ({"order": "best"}, "order"),
    ({"max_rows": 0}, "max_rows"), ({"memory_budget": 0}, "memory_budget"),
    ({"precision": "fp16"}, "precision: expected one of"),
    ({"expect": circuit_of(Graph(1, 2, 2), torch.zeros(4, 8))}, "expect"),
])  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        CircuitFinder(lively("gpt2"), check=False).acdc(pairs(), 1e-3, progress=False, **options)


def test_a_metric_of_ones_own():
    from pahq import CustomMetric

    finder, task = CircuitFinder(lively("llama")), pairs()
    rows = torch.arange(len(task))

    def gap(logits):
        return (logits[:, rows, task.answers] - logits[:, rows, task.wrong_answers]).mean(-1)

    metric = CustomMetric(gap, name="gap", maximise=True)
    found = finder.acdc(task, 1e-2, metric=metric, progress=False)
    wanted = finder.acdc(task, 1e-2, metric="logit_diff", progress=False)
    assert torch.equal(found.present, wanted.present)
    assert found.provenance["metric"] == "gap"
    judged = finder.evaluate(found, task, [metric, "logit_diff"])
    assert judged["gap"] == pytest.approx(judged["logit_diff"])
    scores = [finder.eap(task, metric=m).scores for m in (metric, "logit_diff")]
    torch.testing.assert_close(*scores)
    plain = finder.edge_effects(task, ["m0->m1"], metric=lambda x: -gap(x), progress=False)
    assert len(plain) == 1


def test_where_many_edges_stay_a_batch_has_fewer_rows(monkeypatch):
    finder, task = CircuitFinder(lively("llama", layers=4)), pairs()
    paced = finder.acdc(task, 1e-4, progress=False)
    monkeypatch.setattr("pahq.batches._OVERHEAD", 1e9)
    whole = finder.acdc(task, 1e-4, progress=False)
    assert torch.equal(paced.present, whole.present)
    assert paced.provenance["rows"] < 0.8 * whole.provenance["rows"]
    assert paced.provenance["batches"] >= whole.provenance["batches"]
    # of 50 guesses one is wrong, and a batch takes 2 rows more than it has
    monkeypatch.setattr("pahq.batches._OVERHEAD", 2)
    rows = Batches(Settings(), Search())
    for _ in range(200):
        rows.went(50, True)
    assert rows.worth() == round((2 * 2 * 50) ** 0.5)
