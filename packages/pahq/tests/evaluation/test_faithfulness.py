"""Circuits against their complements and chance."""

import json
import statistics

import pytest
import torch
from pahq import Circuit, CircuitFinder, Graph, Task
from pahq.evaluation import faithfulness
from pahq.evaluation.faithfulness import _drawn
from pahq.truth import plant, wire
from shared_kernels.testing.models import tiny_model

GRAPH = Graph(2, 4, 2)


@pytest.fixture(scope="module")
def planted():
    return plant(GRAPH, wire(GRAPH, heads=3, mlps=1, seed=2), seed=2)


@pytest.fixture(scope="module")
def finder(planted):
    return CircuitFinder(planted.model)


def judged(finder, planted, **options):
    task, other = planted.task(8), planted.task(12, seed=1)
    options = {"held_out": other, "progress": False} | options
    return faithfulness(finder, planted.circuit, task, **options)


def test_a_planted_circuit_is_faithful_and_its_complement_is_not(finder, planted):
    report = judged(finder, planted)
    assert (report.edges, report.total) == (len(planted.circuit), GRAPH.edges)
    for part, pairs in ((report.task, 8), (report.held_out, 12)):
        assert part.pairs == pairs
        assert part.circuit.kl < 1e-6
        assert part.circuit.recovered == pytest.approx(1, abs=1e-3)
        assert part.circuit.agreement == 1
        assert part.none.recovered == 0
        assert part.complement.recovered == pytest.approx(0, abs=1e-3)
        assert part.complement.kl == pytest.approx(part.none.kl, rel=1e-3)
        assert part.complement.agreement == part.none.agreement < 1
        assert len(part.random) == 20
        low, middle, high = part.spread("recovered")
        values = [score.recovered for score in part.random]
        assert (low, middle, high) == (min(values), statistics.median(values), max(values))
        assert high < 0.9


def test_scores_are_those_of_the_finder():
    """On random circuits of a random model, which are neither faithful nor idle."""
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in key:
                p.mul_(4)
    finder, draws = CircuitFinder(model), torch.Generator().manual_seed(3)
    clean, corrupted = torch.randint(3, 96, (2, 16, 6), generator=torch.Generator().manual_seed(0))
    answers = torch.arange(16)
    task = Task(clean, corrupted, torch.full((16,), 5), answers, answers + 20)
    chance = [_drawn(GRAPH, 78, draws) for _ in range(4)]
    some = _drawn(GRAPH, 78, draws)
    report = faithfulness(finder, some, task, random_circuits=4, seed=3, progress=False)
    assert report.held_out is None
    complement = Circuit(GRAPH, ~some.present, some.scores)
    found = [report.task.circuit, report.task.complement, *report.task.random]
    with torch.no_grad():
        first = model(input_ids=task.clean, use_cache=False).logits[:, -1].argmax(-1)
    for score, circuit in zip(found, [some, complement, *chance], strict=True):
        wanted = finder.evaluate(circuit, task)
        assert score.kl == pytest.approx(wanted["kl"]["circuit"], abs=1e-6)
        assert score.recovered == pytest.approx(wanted["logit_diff"]["recovered"], abs=1e-5)
        logits = finder.run(circuit, task.clean, task.corrupted)[:, -1]
        assert score.agreement == float((logits.argmax(-1) == first).double().mean())
    assert len({score.kl for score in found}) == len(found)
    assert any(0 < score.agreement < 1 for score in found)


def test_random_circuits_are_of_that_size_and_uniform():
    draws, count, size = torch.Generator().manual_seed(0), 2000, 40
    full = torch.from_numpy(GRAPH.full())
    taken = torch.zeros(full.shape)
    for _ in range(count):
        one = _drawn(GRAPH, size, draws)
        assert len(one) == size
        taken += one.present
    share = size / GRAPH.edges
    error = (share * (1 - share) / count) ** 0.5
    # the largest of 300 draws from a normal law is beyond 5 standard errors once in 6000 times
    assert float((taken[full] / count - share).abs().max()) < 5 * error
    assert not taken[~full].any()


def test_the_seed_decides(finder, planted):
    few = {"held_out": None, "random_circuits": 3}
    a, b = (judged(finder, planted, seed=1, **few) for _ in range(2))
    assert a == b
    assert a.task.random != judged(finder, planted, seed=2, **few).task.random


def test_both_tasks_are_judged_by_the_same_random_circuits(finder, planted):
    swapped = faithfulness(
        finder, planted.circuit, planted.task(12, seed=1), held_out=planted.task(8),
        random_circuits=5, progress=False,
    )  # fmt: skip
    report = judged(finder, planted, random_circuits=5)
    assert swapped.task.random == report.held_out.random
    assert swapped.held_out.random == report.task.random


def test_plain_runs_are_made_once(finder, planted, monkeypatch):
    calls, plain = [], finder.executor.plain
    monkeypatch.setattr(finder.executor, "plain", lambda ids: calls.append(1) or plain(ids))
    judged(finder, planted)
    assert len(calls) == 4


def test_ablations(finder, planted):
    task = planted.task(8)
    some = planted.circuit.top(4)
    found = [
        faithfulness(finder, some, task, random_circuits=1, ablation=kind, progress=False)
        for kind in ("patch", "mean")
    ]
    assert found[0].task.circuit != found[1].task.circuit
    wanted = finder.evaluate(some, task, ablation="mean")
    assert found[1].task.circuit.kl == pytest.approx(wanted["kl"]["circuit"], abs=1e-6)
    assert "absent ones: mean." in str(found[1])


def test_text_and_json(finder, planted):
    report = judged(finder, planted)
    text = str(report)
    assert f"{len(planted.circuit)} of {GRAPH.edges} edges" in text
    assert "Random: 20 circuits of as many edges, each drawn uniformly from all edges" in text
    assert "task: planted, 8 pairs" in text
    assert "held-out pairs: planted, 12 pairs" in text
    low, middle, high = report.held_out.spread("kl")
    assert f"| random | {middle:.4g} ({low:.4g} to {high:.4g}) |" in text
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["task"]["circuit"]["recovered"] == report.task.circuit.recovered
    assert len(document["held_out"]["random"]) == 20


def test_without_wrong_answers_nothing_is_recovered(finder, planted):
    task = planted.task(4)
    bare = Task(task.clean, task.corrupted, task.positions, task.answers)
    same = Task(task.clean, task.clean, task.positions, task.answers, task.wrong_answers)
    for one in (bare, same):
        report = faithfulness(finder, planted.circuit, one, random_circuits=2, progress=False)
        assert report.task.circuit.recovered is None
        assert report.task.spread("recovered") is None
        assert report.task.circuit.agreement == 1
        assert "unnamed, 4 pairs" in str(report)
        assert json.dumps(report.to_dict(), allow_nan=False)


def test_bad_input(finder, planted):
    task = planted.task(4)
    with pytest.raises(ValueError, match="held_out: expected other pairs than the task's"):
        faithfulness(finder, planted.circuit, task, held_out=planted.task(4))
    with pytest.raises(ValueError, match="random_circuits"):
        faithfulness(finder, planted.circuit, task, random_circuits=0)
    with pytest.raises(ValueError, match="ablation: expected one of"):
        faithfulness(finder, planted.circuit, task, ablation="noise")
    other = Circuit(Graph(1, 1, 1), torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="circuit: expected edges of"):
        faithfulness(finder, other, task)
