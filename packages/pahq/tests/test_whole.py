"""Searches by whole runs: models whose heads share a norm, and rounded activations."""

import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder
from pahq.acdc import Acdc, effects
from pahq.batches import Settings
from pahq.metrics import Metric
from pahq.rounding import RoundedExecutor
from pahq.whole import Whole, WholeRows

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import compare, family, lively, logits, pairs, readers_of, sequential


def whole(finder, task, executor=None):
    """A run that is decided whole, and its metric."""
    executor = executor or finder.executor
    clean, base = executor.plain(task.clean), executor.plain(task.corrupted)
    return Whole(executor, clean, base), Metric("kl", finder.adapter, task, clean.final)


# --- models whose heads share a norm -------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
@pytest.mark.parametrize(("kv", "direct"), [("grouped", False), ("per_query_head", True)])
def test_decisions_are_those_of_the_sequential_algorithm(name, kv, direct):
    task, kept = pairs(), []
    finder = CircuitFinder(family(name), kv=kv)
    for threshold in (1e-4, 0.001, 0.1 if name == "olmo2" else 0.002):
        wanted = sequential(finder, task, threshold, direct)
        for rows in (1, 3, 64):
            found = finder.acdc(task, threshold, direct_edges=direct, max_rows=rows, progress=False)
            compare(found, wanted, finder.graph)
        kept.append(int(wanted[0].sum()))
    assert kept[0] > kept[-1] > 0


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations(ablation):
    finder, task = CircuitFinder(family("gemma2")), pairs()
    wanted = sequential(finder, task, 0.001, ablation=ablation)
    compare(finder.acdc(task, 0.001, ablation=ablation, progress=False), wanted, finder.graph)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_effects_are_those_of_each_edge_alone(name):
    finder, task = CircuitFinder(family(name)), pairs()
    found = finder.edge_effects(task, max_rows=5, progress=False)
    full = torch.from_numpy(finder.graph.full())
    base = finder.executor.plain(task.corrupted)
    measure = Metric("kl", finder.adapter, task, finder.executor.plain(task.clean).final)
    for edge in full.nonzero()[::5].tolist():
        present = full.clone()
        present[tuple(edge)] = False
        run = finder.executor.run(present, task.clean, base)
        wanted = float(measure(run.final[None])[0])
        assert float(found.scores[tuple(edge)]) == pytest.approx(wanted, rel=1e-5, abs=1e-11)


def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    finder, task = CircuitFinder(family("olmo2")), pairs()
    wanted = finder.acdc(task, 0.01, progress=False)
    plain = Acdc.layer

    def stops(search, layer):
        if layer == 0:
            raise KeyboardInterrupt
        plain(search, layer)

    monkeypatch.setattr(Acdc, "layer", stops)
    with pytest.raises(KeyboardInterrupt):
        finder.acdc(task, 0.01, resume_from=tmp_path, progress=False)
    monkeypatch.undo()
    found = finder.acdc(task, 0.01, resume_from=tmp_path, progress=False)
    assert torch.equal(found.present, wanted.present)
    assert torch.equal(found.scores.nan_to_num(7), wanted.scores.nan_to_num(7))
    assert found.provenance == wanted.provenance


# --- models that need none of it: another way to the same ----------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_whole_runs_and_changes_alone_decide_alike(name):
    finder, task = CircuitFinder(lively(name)), pairs()
    wanted = finder.acdc(task, 0.01, direct_edges=True, progress=False)
    current, measure = whole(finder, task)
    search = Acdc(current, measure, 0.01, Settings(rows=7), direct=True)
    for layer in (2, 1, 0):
        search.layer(layer)
    assert torch.equal(current.present, wanted.present)
    assert search.found.value == pytest.approx(wanted.provenance["value"], abs=1e-11)
    # what is held at the end is the circuit's run
    base = finder.executor.plain(task.corrupted)
    again = finder.executor.run(current.present, task.clean, base)
    torch.testing.assert_close(current.final, again.final, rtol=0, atol=1e-10)


def test_memory_that_runs_out_halves_the_rows(monkeypatch):
    finder, task = CircuitFinder(family("gemma2")), pairs()
    wanted = finder.acdc(task, 0.001, progress=False)
    plain = WholeRows.run

    def run(rows, known, changes, names):
        def judge(mine):
            raise torch.OutOfMemoryError("no room")

        if len(names) > 3:
            return rows.caught(judge, names, changes)
        return plain(rows, known, changes, names)

    monkeypatch.setattr(WholeRows, "run", run)
    found = finder.acdc(task, 0.001, progress=False)
    assert torch.equal(found.present, wanted.present)
    assert found.provenance["batches"] > wanted.provenance["batches"]


def test_rows_keep_to_a_budget():
    finder, task = CircuitFinder(family("gemma2")), pairs()
    current, measure = whole(finder, task)
    size = current.row_bytes(0)
    found = effects(
        current, measure, torch.from_numpy(finder.graph.full()), Settings(64, "fp32", 3 * size)
    )
    assert found.rows == finder.graph.edges
    assert found.batches >= finder.graph.edges / 64
    assert (
        WholeRows(current, measure, Settings(64, "fp32", 3 * size), found).removals(0).fitting()
        == 3
    )


# --- rounded activations -------------------------------------------------------------------------


def fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def published(model, ids, layer=None, heads=()):
    """Logits of a model of transformers whose products are rounded, but for some heads."""
    handles, config = [], model.config
    width = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads

    def projected(linear, kept):
        def hook(module, args, out):
            (x,) = args
            found = fp8(x) @ fp8(module.weight).T
            exactly = x @ module.weight.T
            for head in kept:
                some = slice(head * width, (head + 1) * width)
                found[..., some] = exactly[..., some]
            return found if module.bias is None else found + module.bias

        handles.append(linear.register_forward_hook(hook))

    def written(linear, kept):
        def hook(module, args, out):
            (x,), weight = args, module.weight
            on = torch.zeros(x.shape[-1], dtype=torch.bool)
            for head in kept:
                on[head * width : (head + 1) * width] = True
            return x[..., on] @ weight[:, on].T + fp8(x[..., ~on]) @ fp8(weight[:, ~on]).T

        handles.append(linear.register_forward_hook(hook))

    def mlp(module, args, out):
        (x,) = args
        g, u, d = (
            p.weight.bfloat16() for p in (module.gate_proj, module.up_proj, module.down_proj)
        )
        x16 = x.bfloat16()
        inner = torch.nn.functional.silu(x16 @ g.T) * (x16 @ u.T)
        return (inner @ d.T).to(x.dtype)

    for number, block in enumerate(model.model.layers):
        kept = [*heads] if number == layer else []
        keys = sorted({head // group for head in kept})
        projected(block.self_attn.q_proj, kept)
        projected(block.self_attn.k_proj, keys)
        projected(block.self_attn.v_proj, keys)
        written(block.self_attn.o_proj, kept)
        handles.append(block.mlp.register_forward_hook(mlp))
    found = logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("receiver", [None, "a1.h2<q>", "a0.kv1<k>", "a1.kv0<v>", "m1", "logits"])
def test_what_is_rounded_is_what_was_published(receiver):
    model, task = lively("llama"), pairs()
    finder = CircuitFinder(model)
    executor = RoundedExecutor(finder.adapter, finder.graph, "fp8-rtn")
    wanted = published(model, task.clean)
    if receiver is not None:
        executor.focus(finder.graph.receiver_names.index(receiver))
    kept = {"a1.h2<q>": (1, [2]), "a0.kv1<k>": (0, [2, 3]), "a1.kv0<v>": (1, [0, 1])}
    if receiver in kept:
        none, wanted = wanted, published(model, task.clean, *kept[receiver])
        assert float((none - wanted).abs().max()) > 1e-4
    found = finder.adapter.logits(executor.plain(task.clean).final)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert float((found - logits(model, task.clean)).abs().max()) > 1e-2
    baseline = RoundedExecutor(finder.adapter, finder.graph, "rtn-q")
    baseline.focus(0)
    torch.testing.assert_close(
        finder.adapter.logits(baseline.plain(task.clean).final), published(model, task.clean),
        rtol=0, atol=1e-9,
    )  # fmt: skip


def rounded_search(finder, task, threshold, kind):
    """ACDC of which every run is rounded, one whole run for each edge."""
    graph = finder.graph
    executor = RoundedExecutor(finder.adapter, graph, kind)
    clean, base = executor.plain(task.clean), executor.plain(task.corrupted)
    measure = Metric("kl", finder.adapter, task, clean.final)
    present = torch.from_numpy(graph.full())
    effects, needed = {}, {graph.logits}
    for receiver in graph.order():
        readers = readers_of(finder, receiver)
        if receiver != graph.logits and not present[readers][:, list(needed)].any():
            present[:, receiver] = False
            continue
        needed.add(receiver)
        executor.focus(receiver)
        value = lambda: float(measure(executor.run(present, task.clean, base).final[None])[0])  # noqa: E731
        now = value()
        for sender in graph.candidates(receiver):
            present[sender, receiver] = False
            after = value()
            effects[sender, receiver] = after - now
            if after - now < threshold:
                now = after
            else:
                present[sender, receiver] = True
    executor.precise = None
    now = float(measure(executor.run(present, task.clean, base).final[None])[0])
    return present, now, effects, {}


@pytest.mark.parametrize("kind", ["fp8-rtn", "rtn-q"])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_rounded_searches(name, kind):
    finder, task = CircuitFinder(family(name)), pairs()
    wanted = rounded_search(finder, task, 0.01, kind)
    for rows in (1, 64):
        found = finder.acdc(task, 0.01, precision=kind, max_rows=rows, progress=False)
        compare(found, wanted, finder.graph)
        assert found.provenance["precision"] == found.provenance["rounding"] == kind
    exactly = finder.acdc(task, 0.01, progress=False)
    assert not torch.equal(found.present, exactly.present)
