"""The closed form against systems solved by hand, and against training again without a sample."""

import warnings

import pytest
import torch
from sam_if import (
    ConvergenceError,
    HessianInfluence,
    SAMField,
    Scores,
    classification,
    regression,
)
from scipy.stats import spearmanr
from sklearn.datasets import load_wine
from torch.nn.functional import cross_entropy

F64 = torch.float64
DECAY = 0.02


def wine():
    """Standardised, 128 samples to train on and 50 to ask about."""
    x, y = load_wine(return_X_y=True)
    x, y = torch.from_numpy(x), torch.from_numpy(y).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = (x - x[:128].mean(0)) / x[:128].std(0)
    return (x[:128], y[:128]), (x[128:], y[128:])


def field_of(model, data, rho, **options):
    return SAMField(model, classification(), [data], rho, DECAY, perturbation="full", **options)


def at_rest(model, data, rho):
    """Put logistic regression at a fixed point of SAM, from small radii on to large ones."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        decayed = sum((p**2).sum() for p in model.parameters())
        loss = cross_entropy(model(data[0]), data[1]) + DECAY * decayed / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    for part in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        for _ in range(50):
            field = field_of(model, data, part * rho)
            residual = field.residual()
            if residual.norm() < 1e-12:
                break
            field.vector.write(field.weights - torch.linalg.solve(field.dense(), residual))
    assert residual.norm() < 1e-12
    return field


def without(model, data, rho, sample, factors):
    """Return the fixed point without a sample, by steps with the Jacobian of all."""
    weights = torch.ones(len(data[1]), dtype=F64)
    weights[sample] = 0
    begin = field_of(model, data, rho).weights
    for _ in range(300):
        field = field_of(model, data, rho, sample_weights=weights)
        residual = field.residual()
        if residual.norm() < 1e-11:
            break
        field.vector.write(field.weights - torch.linalg.lu_solve(*factors, residual[:, None])[:, 0])
    found = field.weights
    field.vector.write(begin)
    assert residual.norm() < 1e-9
    return found


@pytest.fixture(scope="module")
def retrained():
    """Logistic regression on wine at rho = 1, and 60 of its fixed points without a sample."""
    train, test = wine()
    torch.manual_seed(0)
    model = torch.nn.Linear(13, 3).to(F64)
    field = at_rest(model, train, 1.0)
    factors = torch.linalg.lu_factor(field.dense())
    points = torch.stack([without(model, train, 1.0, n, factors) for n in range(60)])
    return model, train, test, field.weights, points


def judged(retrained, influence):
    """Return medians over samples: the error of the weights, and the order of queries' changes."""
    *_, test, weights, points = retrained
    field = influence.field
    moved = torch.stack([influence.removal([n]) for n in range(len(points))])
    truth = points - weights
    errors = (moved - truth).norm(dim=1) / truth.norm(dim=1)
    with torch.no_grad():
        losses = [field.vector.losses(w, test) for w in (weights, *points)]
    changes = torch.stack(losses[1:]) - losses[0]
    scores = influence.scores([test]).values[:, : len(points)].T
    orders = [spearmanr(a, b).statistic for a, b in zip(scores, changes, strict=True)]
    return float(errors.median()), float(torch.tensor(orders).median())


def test_leaving_one_out(retrained):
    """All of SAM's terms count: frozen, and without SAM, removals are predicted less well."""
    model, train, *_ = retrained
    full = judged(retrained, HessianInfluence(field_of(model, train, 1.0)))
    frozen = judged(retrained, HessianInfluence(field_of(model, train, 1.0, mode="frozen")))
    with pytest.warns(UserWarning, match="no fixed point"):
        plain = judged(retrained, HessianInfluence(field_of(model, train, 0.0)))
    assert full[0] < 0.06
    assert full[1] > 0.99
    assert full[0] < frozen[0] / 2 < plain[0] / 4
    assert full[1] > frozen[1] > plain[1]
    # removals are of samples that help: most own losses rise
    own = HessianInfluence(field_of(model, train, 1.0)).self_influence(range(20))
    assert (own > 0).all()


@pytest.mark.parametrize("solver", ["gmres", "bicgstab"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_solvers_agree(retrained, solver, damping):
    model, train, test, *_ = retrained
    field = field_of(model, train, 1.0)
    few = [(test[0][:3], test[1][:3])]
    wanted = HessianInfluence(field, "dense", damping=damping)
    found = HessianInfluence(field, solver, damping=damping, tolerance=1e-10)
    one, other = wanted.scores(few), found.scores(few)
    torch.testing.assert_close(other.values, one.values, rtol=1e-6, atol=1e-12)
    assert all(residual < 1e-8 for residual in one.residuals + other.residuals)
    torch.testing.assert_close(found.removal([3, 5]), wanted.removal([3, 5]), rtol=1e-6, atol=1e-12)


def test_systems_by_hand(retrained):
    model, train, test, *_ = retrained
    field = field_of(model, train, 1.0)
    influence = HessianInfluence(field, damping=0.05)
    matrix = field.dense() + 0.05 * torch.eye(len(field), dtype=F64)
    sources = torch.stack([field.source(row) for row in torch.eye(field.count, dtype=F64)[:9]])
    asked = torch.func.jacrev(lambda w: field.vector.losses(w, test))(field.weights)
    wanted = asked[:4] @ torch.linalg.solve(matrix, sources.T)
    found = influence.scores([(test[0][:1], test[1][:1]), (test[0][1:4], test[1][1:4])])
    torch.testing.assert_close(found.values[:, :9], wanted, rtol=1e-9, atol=1e-14)
    # a group is the sum of its samples, and a mean the mean of its queries
    group = influence.removal([2, 7])
    torch.testing.assert_close(group, influence.removal([2]) + influence.removal([7]))
    mean = influence.scores([test], mean=True).values
    torch.testing.assert_close(mean[0], influence.scores([test]).mean())
    assert mean.shape == (1, 128)


def test_own_losses(retrained):
    model, train, *_ = retrained
    influence = HessianInfluence(field_of(model, train, 1.0))
    queries = influence.scores([(train[0][:5], train[1][:5])]).values
    torch.testing.assert_close(influence.self_influence(range(5)), queries.diagonal()[:5])


def test_weights_at_no_rest_are_told():
    train, test = wine()
    torch.manual_seed(0)
    influence = HessianInfluence(field_of(torch.nn.Linear(13, 3).to(F64), train, 1.0))
    with pytest.warns(UserWarning, match="the weights are at no fixed point"):
        scores = influence.scores([test])
    assert not scores.reliable


def test_a_system_that_was_given_up_is_told(retrained):
    model, train, test, *_ = retrained
    field = field_of(model, train, 1.0)
    with pytest.warns(UserWarning, match="was left with a residual"):
        scores = HessianInfluence(field, tolerance=1e-20).scores([(test[0][:1], test[1][:1])])
    assert not scores.reliable


def test_what_cannot_be_solved():
    """A feature that is never there, without decay, has no curvature."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).to(F64)
    x = torch.randn(8, 3, dtype=F64)
    x[:, 1] = 0
    data = (x, torch.randn(8, 1, dtype=F64))
    field = SAMField(model, regression(), [data], 0.1)
    asked = (torch.randn(2, 3, dtype=F64), torch.randn(2, 1, dtype=F64))
    for solver in ("dense", "gmres"):
        with pytest.raises(ConvergenceError, match=f"{solver} left a residual"):
            HessianInfluence(field, solver).scores([asked])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert HessianInfluence(field, damping=0.1).scores([asked]).values.isfinite().all()


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda f, q: HessianInfluence(f, "cg"), "solver: expected one of auto, dense, gmres"),
        (lambda f, q: HessianInfluence(f, damping=-1.0), "damping: expected"),
        (lambda f, q: HessianInfluence(f).scores([]), "queries: expected at least one sample"),
        (lambda f, q: HessianInfluence(f).removal([1, 1]), "samples: expected different ones"),
        (lambda f, q: HessianInfluence(f).removal([128]), "samples: expected different ones"),
        (lambda f, q: f.source(torch.ones(3)), r"coefficients: expected \(128,\)"),
        (lambda f, q: f.losses_along(128, f.weights), "sample: expected one below 128"),
    ],
)
def test_what_is_refused(run, match):
    train, test = wine()
    field = field_of(torch.nn.Linear(13, 3).to(F64), train, 0.1)
    with pytest.raises(ValueError, match=match):
        run(field, test)


# --- scores --------------------------------------------------------------------------------------


def test_scores_are_kept(tmp_path):
    values = torch.tensor([[0.5, -2.0, 1.0], [0.0, 1.0, 3.0]], dtype=F64)
    made = Scores(values, "hessian, field, dense", [1e-9, 2e-9], ["mind this"])
    made.save(tmp_path / "scores")
    found = Scores.load(tmp_path / "scores")
    assert torch.equal(found.values, values)
    assert (found.method, found.residuals, found.warnings) == (
        made.method, made.residuals, made.warnings
    )  # fmt: skip
    assert found.top(2) == [(2, 1.0), (0, 0.5)]
    assert found.top(1, harmful=True) == [(1, -2.0)]
    assert found.top(9, query=1) == [(2, 3.0), (1, 1.0), (0, 0.0)]
    joined = found + made
    assert joined.values.shape == (4, 3)
    assert joined.warnings == ["mind this"]
    with pytest.raises(FileExistsError):
        made.save(tmp_path / "scores")
    with pytest.raises(ValueError, match="other: expected scores of hessian"):
        made + Scores(values, "trajectory")
    record = tmp_path / "scores" / "scores.json"
    record.write_text(record.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="folder: expected sam-if-scores 1"):
        Scores.load(tmp_path / "scores")
