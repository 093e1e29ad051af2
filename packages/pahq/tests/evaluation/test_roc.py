"""Areas under curves of true against false edges."""

import json

import numpy as np
import pytest
import torch
from pahq import Circuit, Graph
from pahq.evaluation import auc_roc

GRAPH = Graph(2, 2, 1)
FULL = torch.from_numpy(GRAPH.full())


def circuit(true, false, truth):
    """A circuit with so many true and so many false edges."""
    edges = torch.zeros_like(FULL)
    for pool, count in ((truth.present, true), (FULL & ~truth.present, false)):
        for sender, receiver in pool.nonzero()[:count].tolist():
            edges[sender, receiver] = True
    return Circuit(GRAPH, edges, torch.full(FULL.shape, float("nan")))


def some(count, seed=0):
    edges = FULL.nonzero()
    chosen = edges[
        torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:count]
    ]
    present = torch.zeros_like(FULL)
    present[chosen[:, 0], chosen[:, 1]] = True
    return Circuit(GRAPH, present, present.float())


def scored(seed, levels=None):
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(FULL.shape, generator=draws)
    if levels:
        scores = torch.randint(-levels, levels + 1, FULL.shape, generator=draws).float()
    return Circuit(GRAPH, FULL, scores)


def pairs(circuit, truth, absolute):
    """Shares of pairs of a true and a false edge whose true one has the higher score, or equal."""
    scores = circuit.scores.abs() if absolute else circuit.scores
    right, wrong = scores[truth.present], scores[FULL & ~truth.present]
    higher = (right[:, None] > wrong).double().mean()
    return float(higher), float((right[:, None] == wrong).double().mean())


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_scores_count_pairs(seed, levels, absolute):
    found, truth = scored(seed, levels), some(11, seed)
    higher, equal = pairs(found, truth, absolute)
    assert levels is None or equal > 0.05
    curve = auc_roc(found, truth, mode="trapezoid", absolute=absolute)
    assert curve.area == pytest.approx(higher + equal / 2, abs=1e-12)
    steps = auc_roc(found, truth, absolute=absolute)
    assert steps.mode == "pessimistic"
    assert steps.area == pytest.approx(higher, abs=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize("levels", [None, 3])
def test_scores_as_scikit_learn(levels):
    sklearn = pytest.importorskip("sklearn.metrics")
    found, truth = scored(0, levels), some(9)
    wanted = sklearn.roc_auc_score(truth.present[FULL], found.scores.abs()[FULL])
    assert auc_roc(found, truth, mode="trapezoid").area == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("mode", ["pessimistic", "trapezoid"])
def test_scores_are_a_sweep_of_their_tops(mode):
    found, truth = scored(0), some(11)
    sweep = [found.top(count) for count in range(GRAPH.edges + 1)]
    curve = auc_roc(sweep, truth, mode=mode)
    assert curve.area == pytest.approx(auc_roc(found, truth, mode=mode).area, abs=1e-12)
    assert len(curve.fpr) == GRAPH.edges + 1


def test_edges_that_were_not_found_rank_last():
    truth = some(10)
    scores = torch.full(FULL.shape, float("nan"))
    present = torch.zeros_like(FULL)
    first, second, third = truth.present.nonzero()[:3].tolist()
    for place, score in ((first, -0.5), (second, 0.1)):
        present[tuple(place)] = True
        scores[tuple(place)] = score
    # a score that was measured for an edge that then was removed is no place in the circuit
    scores[tuple(third)] = 9
    curve = auc_roc(Circuit(GRAPH, present, scores), truth)
    assert curve.fpr == (0, 0, 0, 1)
    assert curve.tpr == (0, 0.1, 0.2, 1)
    assert curve.area == pytest.approx(0.2)
    signed = auc_roc(Circuit(GRAPH, present, -scores), truth, absolute=False)
    assert signed.tpr == (0, 0.1, 0.2, 1)
    nothing = Circuit(GRAPH, torch.zeros_like(FULL), scores)
    assert auc_roc(nothing, truth).area == 0
    assert auc_roc(nothing, truth, mode="trapezoid").area == 0.5


def test_a_sweep_by_hand():
    """The areas of staircases below points, as ACDC's code has them."""
    truth = some(8)
    negatives = GRAPH.edges - 8
    assert negatives % 4 == 0
    quarter = negatives // 4
    at = lambda x, y: circuit(round(8 * y), round(4 * x) * quarter, truth)  # noqa: E731
    for points, area, lines in (
        ([(0.5, 0.5)], 0.25, 0.5),
        ([(0.25, 0.25)], 3 / 16, 0.5),
        ([(0.25, 0.25), (0.5, 0.5)], 5 / 16, 0.5),
        ([(0.25, 0.25), (0.75, 0.5)], 4 / 16, 0.25 / 8 + 0.5 * 0.375 + 0.25 * 0.75),
        ([(0.25, 0.5)], 3 / 8, 0.25 / 4 + 0.75 * 0.75),
        # the point at 0.5 is worse in both, and the one beside it in nothing
        ([(0.25, 0.5), (0.5, 0.25)], 3 / 8, 0.25 / 4 + 0.75 * 0.75),
        ([(0.25, 0.5), (0.5, 0.5)], 3 / 8, 0.25 / 4 + 0.25 * 0.5 + 0.5 * 0.75),
        ([(0.25, 0.25), (0.25, 0.75)], 9 / 16, 0.25 / 8 + 0.75 * 0.875),
        ([(0, 1)], 1, 1),
        ([(1, 0)], 0, 0),
    ):  # fmt: skip
        sweep = [at(*point) for point in reversed(points)]
        assert auc_roc(sweep, truth).area == pytest.approx(area), points
        assert auc_roc(sweep, truth, mode="trapezoid").area == pytest.approx(lines), points


def test_the_true_circuit_has_an_area_of_1():
    truth = some(10)
    curve = auc_roc([truth], truth)
    assert curve.area == auc_roc(truth, truth, mode="trapezoid").area == 1
    assert (curve.positives, curve.negatives) == (10, GRAPH.edges - 10)
    text = str(curve)
    assert text.startswith("AUC 1.0000 (pessimistic, 3 points; 10 of ")
    assert "direct edges not counted" in text
    assert json.loads(json.dumps(curve.to_dict()))["tpr"] == [0, 1, 1]


def test_a_guess_is_worth_a_half():
    areas = [auc_roc(scored(seed), some(10), mode="trapezoid").area for seed in range(200)]
    # of 4 standard errors, one of them at most sqrt(1/12 (1/10 + 1/20)) / sqrt(200)
    assert np.mean(areas) == pytest.approx(0.5, abs=0.032)


def test_bad_input():
    truth = some(10)
    with pytest.raises(ValueError, match="mode: expected one of pessimistic, trapezoid"):
        auc_roc(truth, truth, mode="optimistic")
    with pytest.raises(ValueError, match="found: expected a circuit or more"):
        auc_roc([], truth)
    other = Circuit(Graph(1, 1, 1), torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="found: expected edges of"):
        auc_roc([truth, other], truth)
    for count in (0, GRAPH.edges):
        with pytest.raises(ValueError, match="truth: expected some of all edges"):
            auc_roc(truth, some(count))
