"""Wrong labels: scores by hand on small runs, and how they find flipped digits beside others."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from sam_if import (
    SAM,
    HessianInfluence,
    SAMField,
    Trajectory,
    TrajectoryInfluence,
    classification,
    regression,
)
from sam_if.detect import detect_mislabels
from sam_if.evaluate import auroc, retrain_together
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch.nn.functional import cross_entropy

F64 = torch.float64


def network(sizes, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-1]).to(F64)


def trained(model, data, orders, rates, rho=0.2, batch_of=None, **options):
    """Train, and return the record with the weights before each step."""
    x, y = data
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho, lr=0.1, **options)
    trajectory, before = Trajectory(model, classification(), optimizer), []
    for samples, rate in zip(orders, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        before.append({name: value.clone() for name, value in model.state_dict().items()})
        batch = (x[samples], y[samples]) if batch_of is None else batch_of(samples)
        trajectory.record(batch, samples)
        for step in (optimizer.first_step, optimizer.second_step):
            cross_entropy(model(x[samples]), y[samples]).backward()
            step(zero_grad=True)
    return trajectory, before


@pytest.fixture
def small():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=F64)
    y = torch.randint(3, (12,), generator=generator)
    # sample 11 is in no batch
    orders = [torch.randperm(11, generator=generator)[:4] for _ in range(7)]
    orders[0] = torch.tensor([3, 3, 0, 1])
    rates = [0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0]
    model = network((4, 5, 3))
    trajectory, before = trained(model, (x, y), orders, rates, momentum=0.9)
    return model, (x, y), orders, rates, trajectory, before


def test_margins_by_hand(small):
    model, (x, y), orders, rates, trajectory, before = small
    end = {name: value.clone() for name, value in model.state_dict().items()}
    seen = {}
    for state, order, rate in zip(before, orders, rates, strict=True):
        model.load_state_dict(state)
        margins = []
        for n in order.tolist():
            with torch.no_grad():
                logits = model(x[n]).tolist()
            own = logits.pop(int(y[n]))
            margins.append(own - max(logits))
        right = sum(m > 0 for m in margins) / len(margins)
        for n, m in zip(order.tolist(), margins, strict=True):
            seen.setdefault(n, []).append((rate * right, math.tanh(m)))
    model.load_state_dict(end)
    wanted = {}
    for n, found in seen.items():
        total = sum(rate for rate, _ in found)
        wanted[n] = -sum(rate * m for rate, m in found) / total if total else 0.0
    table = detect_mislabels(trajectory)
    assert {row.sample for row in table} == set(wanted)
    for row in table:
        assert row.score == pytest.approx(wanted[row.sample], rel=1e-10, abs=1e-12)
        assert row.label == int(y[row.sample])
        with torch.no_grad():
            loss = float(cross_entropy(model(x[row.sample : row.sample + 1]), y[[row.sample]]))
        assert row.loss == pytest.approx(loss, rel=1e-10)
    assert [row.rank for row in table] == list(range(1, len(table) + 1))
    assert all(a.score >= b.score for a, b in itertools.pairwise(table))
    assert detect_mislabels(trajectory, k=3).rows == table.rows[:3]
    values = table.values(12)
    assert values[11] == -torch.inf
    for row in detect_mislabels(trajectory, "end_margin"):
        with torch.no_grad():
            logits = model(x[row.sample]).tolist()
        own = logits.pop(int(y[row.sample]))
        assert row.score == pytest.approx(max(logits) - own, rel=1e-10)
    assert float(values[table[0].sample]) == table[0].score


def test_own_losses(small):
    *_, trajectory, _ = small
    by_loss = detect_mislabels(trajectory, "loss")
    assert [row.score for row in by_loss] == [row.loss for row in by_loss]
    most = [by_loss[n].sample for n in range(4)]
    influence = TrajectoryInfluence(trajectory)
    own = dict(zip(most, influence.self_influence(most).tolist(), strict=True))
    found = detect_mislabels(trajectory, "self_influence", shortlist=4)
    assert {row.sample for row in found} == set(most)
    for row in found:
        assert row.score == pytest.approx(own[row.sample], rel=1e-10)
    for row in detect_mislabels(influence, "left_out_loss", shortlist=4, together=2):
        assert row.score == pytest.approx(own[row.sample] + row.loss, rel=1e-10)
    traced = TrajectoryInfluence(trajectory, "none")
    other = detect_mislabels(traced, "self_influence", shortlist=4)
    assert [row.score for row in other] != [row.score for row in found]
    # a fifth of those that were trained on, rounded up
    assert len(detect_mislabels(trajectory, "self_influence")) == -(-len(by_loss) // 5)


def test_closed_forms():
    generator = torch.Generator().manual_seed(1)
    parts = [(torch.randn(5, 4, generator=generator, dtype=F64), torch.tensor([0, 1, 2, 1, 0]))
             for _ in range(2)]  # fmt: skip
    model = network((4, 3))
    field = SAMField(model, classification(), parts, 0.1, 0.1)
    influence = HessianInfluence(field)
    table = detect_mislabels(influence, "self_influence", shortlist=10)
    wanted = influence.self_influence()
    for row in table:
        assert row.score == pytest.approx(float(wanted[row.sample]), rel=1e-10)
        x, y = parts[row.sample // 5]
        at = row.sample % 5
        with torch.no_grad():
            loss = float(cross_entropy(model(x[at : at + 1]), y[at : at + 1]))
        assert row.loss == pytest.approx(loss, rel=1e-10)
        assert row.label is None
    with pytest.raises(ValueError, match="run: expected a record of classification"):
        detect_mislabels(influence)


def test_mappings_are_batches_too(small):
    _, data, orders, rates, wanted, _ = small

    class Named(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixels):
            return self.inner(pixels)

    model = Named(network((4, 5, 3)))
    x, y = data
    found, _ = trained(
        model, data, orders, rates, momentum=0.9,
        batch_of=lambda n: {"pixels": x[n], "labels": y[n]},
    )  # fmt: skip
    assert detect_mislabels(found).rows == detect_mislabels(wanted).rows


def test_batches_in_parts(small):
    """A step of two micro-batches is one step, with one part that it gets right."""
    _, (x, y), orders, _, wanted, _ = small
    model = network((4, 5, 3))
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.1, momentum=0.9)
    trajectory = Trajectory(model, classification(), optimizer)
    for order, rate in zip(orders, [0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        trajectory.step_window([((x[n], y[n]), n) for n in (order[:1], order[1:])])
    for one, other in zip(detect_mislabels(trajectory), detect_mislabels(wanted), strict=True):
        assert one.sample == other.sample
        assert one.score == pytest.approx(other.score, rel=1e-9)


def test_tables(small, monkeypatch):
    table = detect_mislabels(small[4])
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert list(frame.columns) == ["sample", "score", "rank", "label", "loss"]
    assert frame["sample"].tolist() == [row.sample for row in table]
    assert isinstance(frame, pandas.DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas: pandas is not installed"):
        table.to_pandas()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"score": "hunch"}, "score: expected one of margin, end_margin"),
        ({"k": 0}, "k: expected an integer in"),
        ({"score": "self_influence", "shortlist": 0}, "shortlist: expected an integer in"),
    ],
)
def test_what_is_refused(small, options, match):
    with pytest.raises(ValueError, match=match):
        detect_mislabels(small[4], **options)


def test_runs_that_have_no_margin():
    model = network((4, 3))
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.1, lr=0.1)
    with pytest.raises(ValueError, match="run: expected recorded steps"):
        detect_mislabels(Trajectory(model, classification(), optimizer))
    trajectory = Trajectory(model, regression(), optimizer)
    x = torch.ones(2, 4, dtype=F64)
    trajectory.record((x, torch.zeros(2, 3, dtype=F64)), [0, 1])
    with pytest.raises(ValueError, match="run: expected a record of classification"):
        detect_mislabels(trajectory)
    assert [row.label for row in detect_mislabels(trajectory, "loss")] == [None, None]


# --- flipped digits ------------------------------------------------------------------------------

#: Each digit and the one that it is taken for.
PAIRS = {3: 8, 8: 3, 4: 9, 9: 4, 1: 7, 7: 1, 0: 6, 6: 0, 2: 5, 5: 2}
COUNT, STEPS, BATCH = 160, 240, 40


def flipped_digits(seed, part=0.3):
    draws = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    chosen = draws.permutation(len(y))[:COUNT]
    x, y, wrong = x[chosen] / 16, y[chosen], draws.random(COUNT) < part
    y = np.array([PAIRS[n] if flip else n for n, flip in zip(y, wrong, strict=True)])
    return torch.from_numpy(x), torch.from_numpy(y), wrong


def judged(seed):
    """Areas under the ROC curve of scores, on a network that learns its labels by heart."""
    x, y, wrong = flipped_digits(seed)
    generator = torch.Generator().manual_seed(seed)
    per = COUNT // BATCH
    orders = [part for _ in range(STEPS // per)
              for part in torch.randperm(COUNT, generator=generator).split(BATCH)]  # fmt: skip
    rates = (0.15 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))).tolist()
    options = {"momentum": 0.9, "weight_decay": 5e-4}
    model = network((64, 16, 10), seed)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    trajectory, _ = trained(model, (x, y), orders, rates, 0.1, **options)
    with torch.no_grad():
        fitted = float((model(x).argmax(1) == y)[wrong].double().mean())
    traced = TrajectoryInfluence(trajectory, "none", check=False)
    field = SAMField(model, classification(), [(x, y)], 0.0, mode="frozen")
    plain = HessianInfluence(field, "dense", damping=0.1)
    found = {
        "margin": detect_mislabels(trajectory).values(COUNT),
        "end margin": detect_mislabels(trajectory, "end_margin").values(COUNT),
        "loss": detect_mislabels(trajectory, "loss").values(COUNT),
        "gradient tracing": traced.self_influence(range(COUNT), together=COUNT),
        "plain influence": plain.self_influence(),
    }
    folds = list(StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y))
    model.load_state_dict(begin)
    points = retrain_together(
        model, classification(), [((x[n], y[n]), n) for n in orders], rates,
        [held for _, held in folds], rho=0.1, **options,
    )  # fmt: skip
    chances = np.zeros((COUNT, 10))
    for point, (_, held) in zip(points, folds, strict=True):
        torch.nn.utils.vector_to_parameters(point, model.parameters())
        with torch.no_grad():
            chances[held] = model(x[held]).softmax(1)
    found["cross-validation"] = suspicion(chances, y.numpy())
    linear = cross_val_predict(
        LogisticRegression(max_iter=200), x, y, cv=folds, method="predict_proba"
    )
    found["cross-validation, linear"] = suspicion(linear, y.numpy())
    return fitted, {name: auroc(v, wrong, resamples=20).auroc for name, v in found.items()}


def suspicion(chances, y):
    """How far the given label's chance is below the largest other one."""
    own, others = chances[np.arange(len(y)), y], chances.copy()
    others[np.arange(len(y)), y] = -1
    return others.max(1) - own


def test_flipped_digits():
    """Margins over a run find more than all that looks at its end, or traces its gradients.

    Cross-validation of a linear model is printed beside: on digits it is a strong rival.
    """
    fitted, found = zip(*(judged(seed) for seed in range(2)), strict=True)
    means = {name: np.mean([areas[name] for areas in found]) for name in found[0]}
    print("\nwrong labels that were learnt by heart:", fitted)
    for name, area in sorted(means.items(), key=lambda item: -item[1]):
        print(f"{name:26} {area:.3f}", [round(areas[name], 3) for areas in found])
    assert min(fitted) > 0.5
    for name in ("end margin", "loss", "gradient tracing", "plain influence", "cross-validation"):
        assert means["margin"] > means[name] + 0.03, name
