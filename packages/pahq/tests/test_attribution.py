"""Scores by gradients, against differences of runs."""

import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder
from pahq.attribution import edge_scores, gradients
from pahq.metrics import Metric

sys.path.insert(0, str(Path(__file__).parent))
from test_acdc import circuit_of, lively, pairs


def parts(name, metric="logit_diff", kv="grouped"):
    finder, task = CircuitFinder(lively(name), kv=kv), pairs()
    clean, corrupted = (finder.executor.plain(ids) for ids in (task.clean, task.corrupted))
    return finder, task, clean, corrupted, Metric(metric, finder.adapter, task, clean.final)


@pytest.mark.parametrize(("name", "kv"), [
    ("llama", "grouped"), ("llama", "per_query_head"), ("qwen3", "grouped"), ("gpt2", "grouped"),
])  # fmt: skip
def test_eap_is_the_derivative_by_a_factor_on_the_edge(name, kv):
    finder, task, clean, corrupted, metric = parts(name, kv=kv)
    scores = finder.eap(task).scores
    exact = edge_scores(finder.executor, clean, corrupted, metric)
    torch.testing.assert_close(scores, exact.float(), rtol=1e-5, atol=1e-9)
    full = torch.from_numpy(finder.graph.full())
    assert (exact[~full] == 0).all()
    if name == "gpt2":
        edges = full.nonzero()[:: len(full.nonzero()) // 25].tolist()
        for sender, receiver in [*edges, [0, finder.graph.logits]]:
            values = []
            for factor in (1 - 1e-5, 1 + 1e-5):
                weights = full.double()
                weights[sender, receiver] = factor
                run = finder.executor.run(weights, task.clean, corrupted)
                values.append(float(metric(run.final[None])[0]))
            slope = (values[0] - values[1]) / 2e-5
            assert float(exact[sender, receiver]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    else:
        # norms of Llama are computed in float32, which differences do not bear
        factors = full.double().requires_grad_()
        run = type(finder.executor).run.__wrapped__
        state = run(finder.executor, factors, task.clean, corrupted)
        (slopes,) = torch.autograd.grad(metric(state.final[None]).sum(), factors)
        torch.testing.assert_close(exact[full], -slopes[full], rtol=0, atol=2e-6)
    assert float(exact.abs().max()) > 1e-2


def test_integrated_gradients_are_complete():
    """The scores of all edges out of the embeddings make up the whole difference."""
    finder, task, clean, corrupted, metric = parts("llama", "nll")
    scores = finder.eap(task, metric="nll", ig_steps=150).scores.double()
    whole, none = (float(metric(run.final[None])[0]) for run in (clean, corrupted))
    assert float(scores[0].sum()) == pytest.approx(none - whole, rel=2e-2)
    assert abs(float(finder.eap(task, metric="nll").scores[0].sum()) - (none - whole)) > 0.05 * abs(
        none - whole
    )


def test_one_step_is_plain():
    finder, task = CircuitFinder(lively("gpt2")), pairs()
    one, plain = finder.eap(task, ig_steps=1), finder.eap(task)
    torch.testing.assert_close(one.scores, plain.scores)
    assert (one.provenance["method"], plain.provenance["method"]) == ("eap-ig", "eap")
    two = finder.eap(task, ig_steps=2)
    assert not torch.allclose(two.scores, plain.scores)


def test_gradients_leave_nothing_behind():
    finder, _, clean, _, metric = parts("qwen3")
    found = gradients(finder.executor, clean.senders[0], metric)
    assert [len(g) for g in found] == [finder.graph.width] * 2 + [1]
    assert all(p.grad is None for p in finder.model.parameters())


def test_the_best_edges_recover_more_than_the_worst():
    finder, task = CircuitFinder(lively("llama")), pairs()
    scored = finder.eap(task, ig_steps=8)
    half = finder.graph.edges // 2
    best = scored.top(half)
    assert len(best) == half
    worst = scored - best
    recovered = [finder.evaluate(c, task)["logit_diff"]["recovered"] for c in (best, worst)]
    assert abs(recovered[0] - 1) < abs(recovered[1] - 1)
    assert len(scored.top(0)) == 0
    assert torch.equal(scored.top(finder.graph.edges).present, scored.present)
    signed = scored.top(5, absolute=False)
    assert float(signed.scores[signed.present].min()) >= float(scored.scores.max()) / 1e3
    with pytest.raises(ValueError, match="count: expected at most"):
        scored.top(finder.graph.edges + 1)


def test_bad_input():
    finder, task = CircuitFinder(lively("llama")), pairs()
    with pytest.raises(ValueError, match="ig_steps: expected some steps for kl"):
        finder.eap(task, metric="kl")
    with pytest.raises(ValueError, match="ig_steps"):
        finder.eap(task, ig_steps=-1)
    with pytest.raises(ValueError, match="metric: expected one of"):
        finder.eap(task, metric="best")
    bare = circuit_of(finder.graph, torch.from_numpy(finder.graph.full()))
    with pytest.raises(ValueError, match="count: expected at most 0"):
        bare.top(1)
