"""Leaving one out and datamodelling scores, of trainings that are made up and of real ones."""

import json
import math

import numpy as np
import pytest
import torch
from sam_if import SAM, Scores, Trajectory, TrajectoryInfluence, classification
from sam_if.evaluate import Agreement, lds, loo, retrain_together
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

F64 = torch.float64
QUERIES, SAMPLES = 3, 30


class Linear:
    """Trainings whose effects add up, and how often they are asked for."""

    def __init__(self, seed=0, noise=0.0, most=None):
        draws = torch.Generator().manual_seed(seed)
        self.effects = torch.randn(QUERIES, SAMPLES, generator=draws, dtype=F64)
        self.noise, self.calls, self.most = noise, [], most

    def __call__(self, removed):
        if self.most is not None and len(self.calls) >= self.most:
            raise KeyboardInterrupt
        self.calls.append(list(removed))
        draws = np.random.default_rng([7, *removed])
        total = 5 + self.effects[:, list(removed)].sum(1)
        return total + self.noise * torch.from_numpy(draws.normal(size=QUERIES))

    def several(self, sets):
        return torch.stack([self(removed) for removed in sets])


def noisy(effects, size, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return effects + size * torch.randn(effects.shape, generator=draws, dtype=F64)


# --- leaving one out -----------------------------------------------------------------------------


def test_leaving_one_out():
    retrain = Linear()
    scores = Scores(noisy(retrain.effects, 0.5), "made up")
    samples = [4, 9, 2, 20, 21, 5, 11]
    found = loo(retrain, scores, samples)
    assert found.samples == tuple(samples)
    torch.testing.assert_close(found.true, retrain.effects[:, samples], rtol=1e-12, atol=1e-12)
    assert torch.equal(found.predicted, scores.values[:, samples])
    for query in range(QUERIES):
        one, other = found.predicted[query], found.true[query]
        assert float(found.spearman[query]) == pytest.approx(spearmanr(one, other).statistic)
        assert float(found.pearson[query]) == pytest.approx(pearsonr(one, other).statistic)
    assert found.mean() == pytest.approx(float(found.spearman.mean()))
    assert found.mean("pearson") == pytest.approx(float(found.pearson.mean()))
    assert sorted(retrain.calls) == sorted([[], *([n] for n in samples)])


def test_intervals():
    retrain = Linear()
    good, bad = noisy(retrain.effects, 0.5), noisy(retrain.effects, 2.0, seed=2)
    one, other = (loo(retrain, scores, range(SAMPLES)) for scores in (good, bad))
    for kind in ("spearman", "pearson"):
        low, high = one.interval(kind)
        assert low < one.mean(kind) < high < 1
        wide = one.interval(kind, confidence=0.99)
        assert wide[0] < low
        assert high < wide[1]
    apart = one.difference(other)
    assert apart.value == pytest.approx(one.mean() - other.mean())
    assert 0 < apart.low < apart.value < apart.high
    same = one.difference(one)
    assert same == (0.0, 0.0, 0.0)
    # paired: what both have in common is no uncertainty
    near = loo(retrain, good + 1e-3 * noisy(retrain.effects, 1.0, seed=3), range(SAMPLES))
    closely = one.difference(near)
    assert closely.high - closely.low < (one.interval()[1] - one.interval()[0]) / 3
    with pytest.raises(ValueError, match="other: expected the same true effects"):
        one.difference(loo(Linear(seed=9), good, range(SAMPLES)))


def test_intervals_hold_what_they_say():
    """Pearson's correlation of normal pairs: 80 % of intervals hold it, about."""
    held, truth = 0, 0.6
    for seed in range(60):
        draws = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 1, 80, generator=draws, dtype=F64)
        found = Agreement(truth * a + math.sqrt(1 - truth**2) * b, a)
        low, high = found.interval("pearson", confidence=0.8, resamples=200)
        held += low <= truth <= high
    assert 38 <= held <= 57


def test_several_at_a_time():
    one, other = Linear(), Linear()
    scores = noisy(one.effects, 0.5)
    alone, together = (
        loo(one, scores, range(7)),
        loo(other.several, scores, range(7), together=3),
    )
    assert torch.equal(alone.true, together.true)


def test_what_is_the_same_everywhere():
    retrain = Linear()
    scores = noisy(retrain.effects, 0.5)
    scores[1] = 0
    found = loo(retrain, scores, range(9))
    assert found.spearman.isnan().tolist() == [False, True, False]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [None, 2])
def test_interrupted_trainings_go_on(tmp_path, together):
    path, samples = tmp_path / "kept.json", range(8)
    first = Linear(most=5)
    scores = noisy(first.effects, 0.5)

    def run(training):
        given = training if together is None else training.several
        return loo(given, scores, samples, together=together, path=path)

    with pytest.raises(KeyboardInterrupt):
        run(first)
    kept = json.loads(path.read_text())["retrainings"]
    assert len(kept) == (5 if together is None else 4)
    second = Linear()
    found = run(second)
    assert torch.equal(found.true, loo(Linear(), scores, samples).true)
    # one of them is made again, to see that it is the same question
    assert len(second.calls) == 9 - len(kept) + 1
    third = Linear()
    run(third)
    assert third.calls == [[]]


def test_files_of_other_questions(tmp_path):
    path = tmp_path / "kept.json"
    retrain = Linear()
    scores = noisy(retrain.effects, 0.5)
    loo(retrain, scores, range(5), path=path)
    with pytest.raises(ValueError, match=r"path: expected what training without \[\] gave"):
        loo(lambda removed: retrain(removed) + 0.01, scores, range(5), path=path)
    with pytest.raises(ValueError, match="path: expected 2 queries, 30 samples"):
        loo(retrain, scores[:2], range(5), path=path)
    with pytest.raises(ValueError, match="path: expected 3 queries, 20 samples"):
        loo(retrain, scores[:, :20], range(5), path=path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="path: expected sam-if-retrainings 1"):
        loo(retrain, scores, range(5), path=path)


# --- datamodelling scores ------------------------------------------------------------------------


def test_sums_of_scores():
    retrain = Linear()
    scores = noisy(retrain.effects, 0.5)
    found = lds(retrain, scores, (0.1, 0.4), subsets=12, seed=3)
    assert list(found.subsets) == [0.1, 0.4]
    for fraction, size in ((0.1, 3), (0.4, 12)):
        chosen = found.subsets[fraction]
        assert len(set(chosen)) == 12
        assert {len(set(subset)) for subset in chosen} == {size}
        predicted = [[sum(row[n] for n in subset) for subset in chosen] for row in scores.tolist()]
        measured = [
            [5 + sum(row[n] for n in s) for s in chosen] for row in retrain.effects.tolist()
        ]
        agreement = found.agreements[fraction]
        np.testing.assert_allclose(agreement.predicted, predicted, rtol=1e-12)
        np.testing.assert_allclose(agreement.true, measured, rtol=1e-12)
    for index, agreement in enumerate(found.agreements.values()):
        assert float(found.spearman[index]) == pytest.approx(agreement.mean())
        assert float(found.pearson[index]) == pytest.approx(agreement.mean("pearson"))
        low, high = found.ci[index]
        assert low < found.spearman[index] < high
    assert [] not in retrain.calls
    based = lds(retrain, scores, (0.1,), subsets=12, seed=3, baseline=True)
    torch.testing.assert_close(based.spearman, found.spearman[:1])
    torch.testing.assert_close(based.agreements[0.1].true, found.agreements[0.1].true - 5)
    exact = lds(Linear(), retrain.effects, (0.1, 0.4), subsets=12)
    torch.testing.assert_close(exact.spearman, torch.ones(2, dtype=F64))


def test_subsets():
    """More of them go on from the same ones, other seeds are others; sums are all that counts."""
    scores = Linear().effects
    few, more, other = (
        lds(Linear(), scores, (0.2,), subsets=size, seed=seed).subsets[0.2]
        for size, seed in ((5, 1), (9, 1), (5, 2))
    )
    assert more[:5] == few
    assert not set(few) & set(other)


def test_what_trainings_add_to_a_file(tmp_path):
    scores = Linear().effects
    lds(Linear(), scores, (0.2,), subsets=5, path=tmp_path / "kept.json")
    again = Linear()
    lds(again, scores, (0.2,), subsets=8, path=tmp_path / "kept.json")
    assert len(again.calls) == 3 + 1


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda r, s: loo(r, s, []), "samples: expected different ones below 30"),
        (lambda r, s: loo(r, s, [1, 1]), "samples: expected different ones below 30"),
        (lambda r, s: loo(r, s, [30]), "samples: expected different ones below 30"),
        (lambda r, s: loo(r, s[0], [1]), r"scores: expected finite \(Q, n\)"),
        (lambda r, s: loo(r, s * math.nan, [1]), r"scores: expected finite \(Q, n\)"),
        (lambda r, s: loo(r, s, [1], together=0), "together: expected an integer in"),
        (lambda r, s: loo(lambda removed: r(removed)[:2], s, [1]), "retrain: expected 1 of shape"),
        (lambda r, s: loo(lambda _: r([1]), s, [1], together=2), "retrain: expected 2 of shape"),
        (lambda r, s: loo(lambda n: r(n) / 0, s, [1]), "retrain: expected finite numbers"),
        (lambda r, s: loo(r, s, [1, 2]).interval(), "removals: expected at least 3"),
        (lambda r, s: loo(r, s, [1, 2]).mean("kendall"), "kind: expected one of spearman"),
        (lambda r, s: lds(r, s, (0.0,)), "fractions: expected parts of the data"),
        (lambda r, s: lds(r, s, (1.0,)), "fractions: expected parts of the data"),
        (lambda r, s: lds(r, s, (0.1,), subsets=2), "subsets: expected an integer in"),
    ],
)
def test_what_is_refused(run, match):
    retrain = Linear()
    with pytest.raises(ValueError, match=match):
        run(retrain, retrain.effects)


# --- real trainings ------------------------------------------------------------------------------


def test_scores_of_a_run_against_training_again():
    """On digits, many trainings at a time: with all terms scores foretell more than without."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x) / 16, torch.from_numpy(y).long()
    (x, query), (y, asked) = x.split([120, len(x) - 120]), y.split([120, len(y) - 120])
    queries = [(query[:6], asked[:6])]
    draws = torch.Generator().manual_seed(0)
    orders = [part for _ in range(10) for part in torch.randperm(120, generator=draws).split(30)]
    rates = [0.2 * (1 + math.cos(math.pi * t / len(orders))) / 2 for t in range(len(orders))]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.GELU(), torch.nn.Linear(8, 10))
    model.to(F64)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.1, momentum=0.9)
    trajectory = Trajectory(model, classification(), optimizer)
    for samples, rate in zip(orders, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        trajectory.record((x[samples], y[samples]), samples)
        for step in (optimizer.first_step, optimizer.second_step):
            cross_entropy(model(x[samples]), y[samples]).backward()
            step(zero_grad=True)
    scores = {
        kind: TrajectoryInfluence(trajectory, kind, check=False).scores(queries)
        for kind in ("full", "none")
    }
    with torch.no_grad():
        wanted = cross_entropy(model(query[:6]), asked[:6], reduction="none")
    model.load_state_dict(begin)

    def retrain(removals):
        return retrain_together(
            model, classification(), [((x[n], y[n]), n) for n in orders], rates, removals,
            rho=0.3, momentum=0.9, queries=queries,
        )  # fmt: skip

    torch.testing.assert_close(retrain([[]])[0], wanted, rtol=1e-10, atol=1e-12)
    found = loo(retrain, scores["full"], range(0, 120, 4), together=32)
    assert found.mean() > 0.9
    assert found.difference(loo(retrain, scores["none"], range(0, 120, 4), together=32)).low > 0.1
    assert lds(retrain, scores["full"], (0.02,), 20, together=32).spearman > 0.85
