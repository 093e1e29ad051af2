"""Removal against fixed points that another solver finds without the samples."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sam_if import (
    SAM,
    ConvergenceError,
    HessianInfluence,
    SAMField,
    Trajectory,
    classification,
    regression,
)
from sam_if.removal import Certificate, Edited, remove
from scipy.optimize import root
from sklearn.datasets import load_digits, load_wine
from torch.func import grad, jacrev
from torch.nn.functional import cross_entropy

F64 = torch.float64
DECAY = 0.02


def wine():
    x, y = load_wine(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:128]
    x, y = torch.from_numpy(x[order]), torch.from_numpy(y[order]).long()
    return (x - x.mean(0)) / x.std(0), y


def digits(count=60):
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:count]) / 16, torch.from_numpy(y[:count]).long()


def pull(w, data, a, rho):
    """G as the formula has it, of logistic regression, without anything of the package."""
    (x, y), classes = data, int(data[1].max()) + 1

    def loss(w):
        matrix, bias = w[:-classes].view(classes, -1), w[-classes:]
        return a @ cross_entropy(x @ matrix.T + bias, y, reduction="none") / len(y)

    g = grad(loss)(w)
    return grad(loss)(w + rho * g / (torch.linalg.vector_norm(g) + 1e-12)) + DECAY * w


def fixed_point(w, data, a, rho):
    """By Powell's hybrid method of MINPACK, and two steps of Newton's for the last digits."""

    def function(at):
        return pull(torch.from_numpy(at), data, a, rho).numpy()

    def jacobian(at):
        return jacrev(lambda v: pull(v, data, a, rho))(torch.from_numpy(at)).numpy()

    at = root(function, w.numpy(), jac=jacobian, options={"xtol": 1e-13}).x
    for _ in range(2):
        at = at - np.linalg.solve(jacobian(at), function(at))
    assert np.linalg.norm(function(at)) < 1e-12
    return torch.from_numpy(at)


def field_of(data, w, rho, *, batches=1, decay=DECAY, **options):
    """The field of logistic regression at these weights."""
    model = torch.nn.Linear(data[0].shape[1], int(data[1].max()) + 1).to(F64)
    parts = list(zip(*(part.chunk(batches) for part in data), strict=True))
    options = {"perturbation": "full", **options}
    field = SAMField(model, classification(), parts, rho, decay, **options)
    field.vector.write(w)
    return SAMField(model, classification(), parts, rho, decay, **options)


def at_rest(data, rho):
    """From small radii on to large ones."""
    w = torch.zeros(int(data[1].max() + 1) * (data[0].shape[1] + 1), dtype=F64)
    for part in (0.1, 0.3, 0.6, 1.0):
        w = fixed_point(w, data, torch.ones(len(data[1]), dtype=F64), part * rho)
    return w


def without(data, samples):
    a = torch.ones(len(data[1]), dtype=F64)
    a[samples] = 0
    return a


@pytest.fixture(scope="module")
def fitted():
    """Wine at three radii."""
    data = wine()
    return data, {rho: at_rest(data, rho) for rho in (0.5, 1.0, 2.0)}


def errors(fitted, rho, method, groups, **options):
    data, points = fitted
    found = []
    for group in groups:
        truth = fixed_point(points[rho], data, without(data, group), rho)
        field = field_of(data, points[rho], rho)
        edited = remove(field, group, method, estimate=False, **options)
        size = torch.linalg.vector_norm(truth - points[rho])
        found.append(float(torch.linalg.vector_norm(edited.weights - truth) / size))
    return np.array(found)


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_one_step_of_newton_is_nearer_than_first_order(fitted, rho):
    """The table of leaving one out: errors of a few percent, and of a third of that."""
    groups = [[n] for n in range(0, 50, 5)]
    first, newton = (
        errors(fitted, rho, method, groups, steps=1) for method in ("first_order", "newton")
    )
    assert np.median(first) < 0.08
    assert np.median(newton) < np.median(first) / 2


def test_newton_comes_to_the_fixed_point(fitted):
    groups = [[0, 9, 17], list(range(20, 40))]
    assert errors(fitted, 1.0, "newton", groups, steps=12).max() < 1e-10
    three = errors(fitted, 1.0, "newton", groups, steps=3)
    first = errors(fitted, 1.0, "first_order", groups)
    assert (three < first / 3).all()


def test_residuals_fall(fitted):
    """With groups and a large radius, where whole steps of Newton's would not do."""
    data, points = fitted
    lengths = []
    for start in (0, 40, 80):
        group = list(range(start, start + 16))
        field = field_of(data, points[2.0], 2.0)
        told = remove(field, group, steps=5, estimate=False).certificate
        assert all(b < a for a, b in itertools.pairwise(told.residuals))
        assert len(told.residuals) == len(told.lengths) + 1
        lengths += told.lengths
        # what is told is what the formula says
        begin = torch.linalg.vector_norm(pull(points[2.0], data, without(data, group), 2.0))
        assert told.residual_before == pytest.approx(float(begin), rel=1e-9)
    assert max(lengths) == 1.0
    assert min(lengths) < 1.0


def test_what_a_certificate_says(fitted):
    data, points = fitted
    w, group, a = points[0.5], [3, 8], without(wine(), [3, 8])
    truth = fixed_point(w, data, a, 0.5)
    field = field_of(data, w, 0.5)
    for method in ("first_order", "newton"):
        edited = remove(field, group, method, steps=1)
        told, at = edited.certificate, edited.weights
        left = pull(at, data, a, 0.5)
        assert told.method == method
        assert told.samples == (3, 8)
        size = float(torch.linalg.vector_norm(left))
        assert told.residual_after == pytest.approx(size, rel=1e-6)
        assert told.residual_after < told.residual_before
        jacobian = jacrev(lambda v: pull(v, data, a, 0.5))(at)
        step = torch.linalg.vector_norm(torch.linalg.solve(jacobian, left))
        assert told.distance_estimate == pytest.approx(float(step), rel=1e-6)
        # an estimate: near the distance, and nothing that bounds it
        true = torch.linalg.vector_norm(at - truth)
        assert told.distance_estimate == pytest.approx(float(true), rel=0.2)
        by_hand = field_of(data, at, 0.5, sample_weights=a)
        assert told.stationarity_after == pytest.approx(by_hand.stationarity(), rel=1e-9)
        assert told.stationarity_after < told.stationarity_before
        assert max(told.solver_residuals) < 1e-9
        assert told.reliable
    assert "approximate" in str(told)
    assert torch.equal(field.weights, w)


def test_first_order_is_the_sum_of_removals(fitted):
    data, points = fitted
    field = field_of(data, points[1.0], 1.0)
    edited = remove(field, [2, 7, 50], "first_order")
    alone = sum(HessianInfluence(field).removal([n]) for n in (2, 7, 50))
    torch.testing.assert_close(edited.weights - field.weights, alone, rtol=1e-9, atol=1e-15)
    assert edited.certificate.lengths == []
    assert len(edited.certificate.residuals) == 2


def test_who_is_gone_already_stays_gone(fitted):
    """Two removals one after the other are one of both."""
    data, points = fitted
    both = remove(field_of(data, points[0.5], 0.5), [3, 8], steps=12, estimate=False)
    one = remove(field_of(data, points[0.5], 0.5), [3], steps=12, estimate=False)
    again = field_of(data, one.weights, 0.5, sample_weights=without(data, [3]))
    torch.testing.assert_close(
        remove(again, [8], steps=12, estimate=False).weights, both.weights, rtol=1e-9, atol=1e-11
    )
    with pytest.raises(ValueError, match="samples: expected some that are there"):
        remove(again, [3])
    # half a sample is removed by half
    half = field_of(data, points[0.5], 0.5, sample_weights=(1 + without(data, [3])) / 2)
    whole = field_of(data, points[0.5], 0.5)
    found = remove(half, [3], "first_order").weights - half.weights
    source = half.source((1 - without(data, [3])) / 2)
    wanted = torch.linalg.solve(half.dense(), source)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(found, remove(whole, [3], "first_order").weights - whole.weights)


@pytest.mark.parametrize("solver", ["gmres", "bicgstab"])
def test_iterative_solvers(fitted, solver):
    data, points = fitted
    field = field_of(data, points[1.0], 1.0)
    for method in ("first_order", "newton"):
        options = {"steps": 1, "estimate": False}
        wanted = remove(field, [5, 6], method, "dense", **options).weights
        found = remove(field, [5, 6], method, solver, tolerance=1e-10, **options)
        torch.testing.assert_close(found.weights, wanted, rtol=1e-6, atol=1e-9)
        assert 0 < max(found.certificate.solver_residuals) < 1e-8


def test_an_approximate_solver(fitted):
    """It leads downwards, and nothing of its own systems is told as if it were of the field's."""
    data, points = fitted
    field = field_of(data, points[0.5], 0.5)
    told = remove(field, [5, 6], "newton", "ekfac", steps=3).certificate
    assert len(told.lengths) == 3
    assert all(b < a for a, b in itertools.pairwise(told.residuals))
    assert told.solver_residuals == []
    assert told.distance_estimate is None


def test_digits():
    """Without a matrix, in batches of one perturbation, against a fixed point found anew."""
    data, group = digits(), [0, 11, 42]
    w = at_rest(data, 0.2)
    truth = fixed_point(w, data, without(data, group), 0.2)
    field = field_of(data, w, 0.2, batches=3)
    edited = remove(field, group, "newton", "gmres", steps=5, tolerance=1e-8, estimate=False)
    size = torch.linalg.vector_norm(truth - w)
    assert torch.linalg.vector_norm(edited.weights - truth) < 1e-7 * size
    first = remove(field, group, "first_order", "gmres", tolerance=1e-8, estimate=False)
    assert torch.linalg.vector_norm(first.weights - truth) > 0.05 * size


def test_each_batch_has_its_perturbation(fitted):
    """A batch that is left empty pulls nowhere, and its place counts on."""
    (x, y), points = fitted
    data = (x[:16], y[:16])
    field = field_of(data, points[0.5], 0.5, batches=2, perturbation="minibatch")
    with pytest.warns(UserWarning, match="no fixed point"):
        edited = remove(field, range(8), steps=8)
    other = (x[8:16], y[8:16])
    alone = pull(edited.weights, other, torch.ones(8, dtype=F64), 0.5) - DECAY * edited.weights
    left = DECAY * edited.weights + alone / 2
    size = float(torch.linalg.vector_norm(left))
    assert size == pytest.approx(edited.certificate.residual_after, abs=1e-12)
    assert size < 1e-9


# --- what it is made into ------------------------------------------------------------------------


def test_models_are_given_the_weights(fitted):
    data, points = fitted
    edited = remove(field_of(data, points[0.5], 0.5), [3])
    model = torch.nn.Linear(13, 3).to(F64)
    edited.apply(model)
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(found, edited.weights)
    other = torch.nn.Linear(13, 3).to(F64)
    other.load_state_dict(edited.state_dict())
    assert torch.equal(other.weight, model.weight)
    for wrong in (torch.nn.Linear(13, 4), torch.nn.Sequential(torch.nn.Linear(13, 3))):
        before = [p.clone() for p in wrong.parameters()]
        with pytest.raises(ValueError, match="model: expected"):
            edited.apply(wrong.to(F64))
        assert all(torch.equal(a, b) for a, b in zip(before, wrong.parameters(), strict=True))


def test_frozen_parameters_stay():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    model.to(F64)[0].requires_grad_(False)
    field = SAMField(model, classification(), [wine()], 0.1, 0.5)
    with pytest.warns(UserWarning, match="no fixed point"):
        edited = remove(field, [3])
    assert list(edited.state_dict()) == ["2.weight", "2.bias"]
    before = model[0].weight.clone()
    edited.apply(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model[2].bias, edited.weights[-3:])


def test_what_is_kept(fitted, tmp_path):
    data, points = fitted
    edited = remove(field_of(data, points[0.5], 0.5), [3, 8])
    edited.save(tmp_path / "edited")
    found = Edited.load(tmp_path / "edited")
    assert torch.equal(found.weights, edited.weights)
    assert found.certificate == edited.certificate
    assert isinstance(found.certificate, Certificate)
    assert list(found.state_dict()) == ["weight", "bias"]
    assert set(load_file(tmp_path / "edited" / "weights.safetensors")) == {"weight", "bias"}
    with pytest.raises(FileExistsError):
        edited.save(tmp_path / "edited")
    file = tmp_path / "edited" / "certificate.json"
    record = json.loads(file.read_text())
    assert record["kind"] == "approximate unlearning"
    assert "guarantee" not in file.read_text()
    file.write_text(json.dumps(record | {"version": 9}))
    with pytest.raises(ValueError, match="folder: expected sam-if-edit 1"):
        Edited.load(tmp_path / "edited")


# --- faults --------------------------------------------------------------------------------------


def test_weights_that_are_at_no_rest(fitted):
    data, _ = fitted
    w = torch.randn(42, generator=torch.Generator().manual_seed(0), dtype=F64)
    with pytest.warns(UserWarning, match="the weights are at no fixed point"):
        told = remove(field_of(data, w, 0.5), [3], steps=1).certificate
    assert not told.reliable


def test_edits_that_make_it_worse_are_told(fitted):
    """A linear step for most of the data goes too far where perturbations move much."""
    data, points = fitted
    field = field_of(data, points[2.0], 2.0)
    with pytest.warns(UserWarning, match="a larger residual than before"):
        told = remove(field, range(100), "first_order", estimate=False).certificate
    assert told.residual_after > told.residual_before
    assert not told.reliable
    with pytest.warns(UserWarning, match="take more steps"):
        newton = remove(field, range(100), steps=1, estimate=False).certificate
    assert newton.residual_after < newton.residual_before


class Waves:
    """Losses that bend downwards between the top of one and its flank."""

    def losses(self, model, batch):
        return torch.cos(model(batch)[:, 0])

    measure = losses


def test_a_search_that_finds_nothing_is_told():
    """With more damping than the curvature is negative, Newton's direction leads uphill."""
    model = torch.nn.Linear(1, 1, bias=False).to(F64)
    torch.nn.init.constant_(model.weight, 0.1)
    field = SAMField(model, Waves(), [torch.ones(2, 1, dtype=F64)], 0.0)
    with pytest.warns(UserWarning, match="no step along Newton's direction"):
        edited = remove(field, [1], damping=2.0, estimate=False)
    assert edited.certificate.lengths == []
    assert len(edited.certificate.residuals) == 1
    assert torch.equal(edited.weights, field.weights)


def test_no_estimate_is_told():
    """A feature of the removed sample alone has no curvature without it, and without decay."""
    model = torch.nn.Linear(2, 1, bias=False).to(F64)
    field = SAMField(model, regression(), [(torch.eye(2, dtype=F64), torch.ones(2, 1))], 0.0)
    with pytest.warns(UserWarning, match="no estimate of the distance: solver: dense left"):
        told = remove(field, [1], "first_order").certificate
    assert told.distance_estimate is None
    assert "estimate" not in str(told).splitlines()[0]
    with pytest.raises(ConvergenceError, match="left a residual"):
        remove(field, [1], "newton")


@pytest.mark.parametrize(
    ("samples", "options", "match"),
    [
        ([], {}, "samples: expected at least one"),
        ([1, 1], {}, "samples: expected different ones below 128"),
        ([128], {}, "samples: expected different ones below 128"),
        ([-1], {}, "samples: expected different ones below 128"),
        (range(128), {}, "samples: expected some to be left"),
        ([1], {"method": "scrub"}, "method: expected one of first_order, newton"),
        ([1], {"steps": 0}, "steps: expected an integer in"),
        ([1], {"solver": "cg"}, "solver: expected one of auto, dense"),
        ([1], {"damping": -1.0}, "damping: expected"),
    ],
)
def test_what_is_refused(fitted, samples, options, match):
    data, points = fitted
    with pytest.raises(ValueError, match=match):
        remove(field_of(data, points[0.5], 0.5), samples, **options)


# --- of recorded runs ----------------------------------------------------------------------------


def recorded(steps=60):
    x, y = (part[:60] for part in wine())
    torch.manual_seed(0)
    model = torch.nn.Linear(x.shape[1], 3).to(torch.float64)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.5, weight_decay=0.05)
    run = Trajectory(model, classification(), optimizer)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        run.step((x[order], y[order]), order)
    run.finish()
    return run, (x, y)


def test_replay_is_training_again():
    run, (x, y) = recorded()
    edited = remove(run, [4, 7], "replay")
    torch.manual_seed(0)
    model = torch.nn.Linear(x.shape[1], 3).to(torch.float64)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.5, weight_decay=0.05)
    weights = torch.ones(len(x), dtype=torch.float64)
    weights[[4, 7]] = 0
    for _ in range(60):
        for step in (optimizer.first_step, optimizer.second_step):
            losses = cross_entropy(model(x), y, reduction="none")
            (losses * weights).mean().backward()
            step(zero_grad=True)
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(edited.weights, wanted, rtol=1e-10, atol=1e-12)
    assert str(edited.certificate) == "training again without 2 samples (replay)"
    assert edited.certificate.reliable


def test_a_run_has_a_field(tmp_path):
    """Numbers are those of the data, not of the order that they were trained on in."""
    run, (x, y) = recorded(300)
    field = SAMField(run.model, classification(), [(x, y)], 0.2, 0.05, perturbation="full")
    wanted = remove(field, [4, 7])
    found = remove(run, [4, 7])
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-8, atol=1e-10)
    assert found.certificate.samples == (4, 7)
    exact = remove(run, [4, 7], "replay")
    moved = exact.weights - run.weights
    assert (found.weights - exact.weights).norm() < 0.05 * moved.norm()
    exact.save(tmp_path / "edit")
    assert Edited.load(tmp_path / "edit").certificate == exact.certificate
    with pytest.raises(ValueError, match="source: expected a recorded run, got str 'SAMField'"):
        remove(field, [1], "replay")
    for method in ("replay", "newton"):
        with pytest.raises(ValueError, match="samples: expected"):
            remove(run, [10_000], method)
        with pytest.raises(ValueError, match="samples: expected"):
            remove(run, [], method)
