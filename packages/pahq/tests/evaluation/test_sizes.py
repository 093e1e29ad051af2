"""CPR and CMD against their definition."""

import json

import numpy as np
import pytest
import torch
from pahq import Circuit, CircuitFinder, Graph, Task
from pahq.evaluation import SIZES, cpr_cmd
from pahq.truth import plant, wire
from shared_kernels.testing.models import tiny_model

#: As the benchmark's code writes them.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


def lively(name="llama"):
    torch.manual_seed(0)
    model = tiny_model(name, num_hidden_layers=2).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in key:
                p.mul_(4)
    return CircuitFinder(model)


def pairs(n=3, size=8, seed=0):
    draws = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(3, 96, (2, n, size), generator=draws)
    return Task(clean, corrupted, torch.full((n,), size - 1), torch.arange(5, 5 + n),
                torch.arange(20, 20 + n))  # fmt: skip


@pytest.fixture(scope="module")
def finder():
    return lively()


def test_shares_are_those_of_the_benchmark():
    assert tuple(size / 100 for size in SIZES) == SHARES


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "kl"])
def test_areas_by_definition(finder, metric, absolute):
    task, other = pairs(), pairs(seed=1)
    scores = finder.eap(task)
    found = cpr_cmd(finder, scores, other, metric=metric, absolute=absolute, progress=False)
    edges, heights = finder.graph.edges, []
    for share in SHARES:
        one = scores.top(int(share * edges), absolute=absolute)
        heights.append(finder.evaluate(one, other, [metric])[metric]["recovered"])
    assert found.edges == tuple(int(share * edges) for share in SHARES)
    assert found.recovered == pytest.approx(heights, abs=1e-9)
    assert found.recovered[-1] == pytest.approx(1, abs=1e-9)
    heights = np.array(heights)
    assert found.cpr == pytest.approx(np.trapezoid(heights, SHARES), abs=1e-9)
    assert found.cmd == pytest.approx(np.trapezoid(np.abs(1 - heights), SHARES), abs=1e-9)
    ends = finder.evaluate(scores.top(0), other, [metric])[metric]
    assert (found.whole, found.none) == pytest.approx((ends["all"], ends["none"]), abs=1e-9)


def test_signed_and_absolute_scores_rank_otherwise(finder):
    scores, task = finder.eap(pairs()), pairs()
    assert int((scores.scores < 0).sum()) > 10
    a, b = (cpr_cmd(finder, scores, task, absolute=x, progress=False) for x in (True, False))
    assert a.edges == b.edges
    assert a.recovered != b.recovered


def test_a_planted_circuit_recovers_all_from_its_size_on():
    graph = Graph(2, 4, 2)
    planted = plant(graph, wire(graph, heads=2, mlps=1, seed=1), seed=1)
    finder = CircuitFinder(planted.model)
    size = 100 * (len(planted.circuit) + 0.5) / graph.edges
    scores = Circuit(graph, torch.from_numpy(graph.full()), planted.circuit.scores)
    task = planted.task(8)
    found = cpr_cmd(finder, scores, task, sizes=(size, 2 * size, 100), progress=False)
    assert found.edges[0] == len(planted.circuit)
    assert found.recovered == pytest.approx((1, 1, 1), abs=1e-3)
    assert found.cpr == pytest.approx(1 - size / 100, abs=1e-3)
    assert found.cmd < 1e-3
    # ranked last, its edges come back at 100 %
    worst = Circuit(graph, scores.present, 1 - scores.scores)
    found = cpr_cmd(finder, worst, task, sizes=(1, 50, 100), progress=False)
    assert found.recovered == pytest.approx((0, 0, 1), abs=1e-3)
    assert found.cpr == pytest.approx(0.25, abs=1e-3)
    assert found.cmd == pytest.approx(0.49 + 0.25, abs=1e-3)


def test_a_circuit_for_each_size(finder):
    task, scores = pairs(), finder.eap(pairs())
    sizes = (1, 10, 100)
    wanted = cpr_cmd(finder, scores, task, sizes=sizes, progress=False)
    chosen = [scores.top(count) for count in wanted.edges]
    for given in (chosen, chosen[:-1]):
        found = cpr_cmd(finder, given, task, sizes=sizes, progress=False)
        assert found.recovered == wanted.recovered
        assert found.edges == wanted.edges
        assert found.absolute is None
    with pytest.raises(ValueError, match="circuit: expected 3 circuits, got int 1"):
        cpr_cmd(finder, chosen[:1], task, sizes=sizes)
    with pytest.raises(ValueError, match="circuit: expected 2 circuits, got int 1"):
        cpr_cmd(finder, chosen[:1], task, sizes=(1, 10))


def test_ablations(finder):
    task, scores = pairs(), finder.eap(pairs())
    found = cpr_cmd(finder, scores, task, sizes=(10, 50), ablation="zero", progress=False)
    for f, count in zip(found.recovered, found.edges, strict=True):
        wanted = finder.evaluate(scores.top(count), task, ["logit_diff"], ablation="zero")
        assert f == pytest.approx(wanted["logit_diff"]["recovered"], abs=1e-9)
    patched = cpr_cmd(finder, scores, task, sizes=(10, 50), progress=False)
    assert patched.recovered != found.recovered


def test_plain_runs_are_made_once(finder, monkeypatch):
    scores, calls = finder.eap(pairs()), []
    plain = finder.executor.plain
    monkeypatch.setattr(finder.executor, "plain", lambda ids: calls.append(1) or plain(ids))
    cpr_cmd(finder, scores, pairs(), progress=False)
    assert len(calls) == 2


def test_text_and_json(finder):
    found = cpr_cmd(finder, finder.eap(pairs()), pairs(), progress=False)
    text = str(found)
    assert text.startswith(f"CPR {found.cpr:.4f}, CMD {found.cmd:.4f} (logit_diff)")
    assert text.splitlines()[-1] == f"| 100 | {finder.graph.edges:,} | 1.0000 |"
    document = json.loads(json.dumps(found.to_dict()))
    assert document["cpr"] == found.cpr
    assert document["sizes"] == list(SIZES)


def test_bad_input(finder):
    scores, task = finder.eap(pairs()), pairs()
    for sizes in ((10,), (), (10, 10), (20, 10), (0, 10), (10, 101), (float("nan"), 1)):
        with pytest.raises(ValueError, match="sizes: expected two or more, ascending"):
            cpr_cmd(finder, scores, task, sizes=sizes)
    with pytest.raises(ValueError, match="edges without a score have no rank"):
        cpr_cmd(finder, scores.top(50), task)
    other = Circuit(Graph(1, 1, 1), torch.zeros(3, 5), torch.zeros(3, 5))
    for given in (other, [scores, other]):
        with pytest.raises(ValueError, match="circuit: expected edges of"):
            cpr_cmd(finder, given, task, sizes=(1, 100))
    with pytest.raises(ValueError, match="metric: expected one of"):
        cpr_cmd(finder, scores, task, metric="accuracy")
    with pytest.raises(ValueError, match="ablation: expected one of"):
        cpr_cmd(finder, scores, task, ablation="noise")
    same = Task(task.clean, task.clean, task.positions, task.answers, task.wrong_answers)
    with pytest.raises(ValueError, match="task: expected a metric that the edges change"):
        cpr_cmd(finder, scores, same)
