"""SAM's field, Jacobians and sources against automatic differentiation of their definitions."""

import copy

import numpy as np
import pytest
import torch
from sam_if import ConvergenceError, SAMField, classification, regression
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn.functional import cross_entropy

F64 = torch.float64
DECAY = 0.03


def network(seed=0):
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    return torch.nn.Sequential(*layers).to(F64)


def batches(sizes=(6, 6, 4), seed=1):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        x = torch.randn(size, 4, generator=generator, dtype=F64)
        found.append((x, torch.randint(3, (size,), generator=generator)))
    return found


class Written:
    """G as the formula has it, without anything of the package."""

    def __init__(self, model, data, rho, adaptive=False, full=False, mode="field", norm_eps=1e-12):
        self.model, self.rho, self.adaptive, self.mode = model, rho, adaptive, mode
        self.norm_eps = norm_eps
        at, self.groups = 0, []
        for x, y in data:
            self.groups.append((x, y, slice(at, at + len(y))))
            at += len(y)
        self.count = at
        # weights of samples that a frozen perturbation is of
        self.base = torch.ones(at, dtype=F64)
        if full:
            x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
            self.groups = [(x, y, slice(0, at))]
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.w = torch.cat([p.detach().flatten() for p in model.parameters()])

    def losses(self, w, x, y):
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = dict(zip(self.shapes, w.split(sizes), strict=True))
        parts = {name: part.view(self.shapes[name]) for name, part in parts.items()}
        return cross_entropy(functional_call(self.model, parts, (x,)), y, reduction="none")

    def loss(self, group, a):
        """The loss of a batch as a function of the weights."""
        x, y, place = group
        return lambda w: (a[place] * self.losses(w, x, y)).sum() / len(y)

    def epsilon(self, w, gradient):
        t = w.abs() if self.adaptive else torch.ones_like(w)
        return self.rho * t**2 * gradient / (((t * gradient) ** 2).sum().sqrt() + self.norm_eps)

    def worst(self, w, a):
        """``L(w + eps(w))``, a mean over batches, and the decay's term."""
        total = 0.0
        for group in self.groups:
            loss = self.loss(group, a)
            total = total + loss(w + self.epsilon(w, grad(loss)(w)))
        return total / len(self.groups) + DECAY * (w**2).sum() / 2

    def field(self, w, a):
        if self.mode == "objective":
            return grad(self.worst)(w, a)
        total = 0.0
        for group in self.groups:
            loss = self.loss(group, a)
            epsilon = self.epsilon(w, grad(loss)(w))
            if self.mode == "frozen":
                fixed = self.loss(group, self.base)
                epsilon = self.epsilon(self.w, grad(fixed)(self.w))
            total = total + grad(loss)(w + epsilon)
        return total / len(self.groups) + DECAY * w


CASES = [
    (mode, adaptive, full)
    for mode in ("field", "frozen", "objective")
    for adaptive in (False, True)
    for full in (False, True)
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def both(request):
    mode, adaptive, full = request.param
    model, data, rho = network(), batches(), 0.6 if adaptive else 0.3
    options = {"adaptive": adaptive, "mode": mode, "norm_eps": 0.01}
    field = SAMField(
        model, classification(), data, rho, DECAY, perturbation="full" if full else "minibatch",
        **options,
    )  # fmt: skip
    return field, Written(model, data, rho, full=full, **options)


def near(found, wanted, bound=1e-12):
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def test_products_are_those_of_the_jacobian(both):
    field, written = both
    a = torch.ones(written.count, dtype=F64)
    near(field.residual(), written.field(written.w, a))
    wanted = jacrev(written.field)(written.w, a)
    assert field.mode != "field" or (wanted - wanted.T).abs().max() > 1e-3 * wanted.abs().max()
    near(field.dense(), wanted)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, len(field), generator=generator, dtype=F64)
    near(field.rmatvec(y), wanted.T @ y)
    assert float(x @ field.rmatvec(y)) == pytest.approx(float(field.matvec(x) @ y), rel=1e-12)
    operator = field.to_scipy()
    near(torch.from_numpy(operator @ x.numpy()), wanted @ x)
    near(torch.from_numpy(operator.T @ y.numpy()), wanted.T @ y)


def test_sources_are_derivatives_by_the_weights_of_samples(both):
    field, written = both
    a = torch.ones(written.count, dtype=F64)
    wanted = jacrev(written.field, argnums=1)(written.w, a)
    y = torch.randn(len(field), generator=torch.Generator().manual_seed(4), dtype=F64)
    near(field.source_dots(y), wanted.T @ y)
    c = torch.randn(written.count, generator=torch.Generator().manual_seed(6), dtype=F64)
    near(field.source(c), wanted @ c)
    # the same by differences, of one sample
    step = torch.zeros_like(a)
    step[2] = 1e-5
    apart = (written.field(written.w, a + step) - written.field(written.w, a - step)) / 2e-5
    assert float(apart @ y) == pytest.approx(float(field.source_dots(y)[2]), rel=1e-7)


def test_weights_of_samples_count(both):
    _, written = both
    a = torch.rand(written.count, generator=torch.Generator().manual_seed(5), dtype=F64)
    data = batches()
    field = SAMField(
        written.model, classification(), data, written.rho, DECAY, adaptive=written.adaptive,
        mode=written.mode, perturbation="full" if len(written.groups) == 1 else "minibatch",
        sample_weights=a, norm_eps=written.norm_eps,
    )  # fmt: skip
    written.base = a
    near(field.residual(), written.field(written.w, a))
    near(field.dense(), jacrev(written.field)(written.w, a))
    y = torch.randn(len(field), generator=torch.Generator().manual_seed(4), dtype=F64)
    near(field.source_dots(y), jacrev(written.field, argnums=1)(written.w, a).T @ y)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_hessian_of_the_objective_has_third_derivatives(adaptive):
    model, data = network(), batches()
    field = SAMField(model, classification(), data, 0.3, DECAY, adaptive=adaptive, mode="objective")
    written = Written(model, data, 0.3, adaptive)
    a = torch.ones(written.count, dtype=F64)
    wanted = hessian(written.worst)(written.w, a)
    near(field.dense(), wanted, 1e-10)


# --- the exact maximiser ------------------------------------------------------------------------


def maximised(written, w, a, rho):
    """The gradient of the largest loss within rho, by projected ascent from many steps."""
    total = 0.0
    for group in written.groups:
        loss = written.loss(group, a)
        epsilon = written.epsilon(w, grad(loss)(w))
        for _ in range(2000):
            # half a step, which converges where whole ones go to and fro
            found = grad(loss)(w + epsilon)
            step = epsilon + rho * found / found.norm()
            after = rho * step / step.norm()
            near_enough = (after - epsilon).norm() < 1e-15
            epsilon = after
            if near_enough:
                break
        total = total + grad(loss)(w + epsilon)
    return total / len(written.groups) + DECAY * w


def test_the_exact_maximiser():
    model, data, rho = network(), batches((5, 4)), 0.1
    field = SAMField(model, classification(), data, rho, DECAY, mode="envelope")
    written = Written(model, data, rho)
    a = torch.ones(written.count, dtype=F64)
    near(field.residual(), maximised(written, written.w, a, rho), 1e-9)
    for epsilon, group in zip(field.epsilons(), field.groups, strict=True):
        found = group.gradient(field.weights + epsilon)
        near(found / found.norm(), epsilon / rho, 1e-8)
    x = torch.randn(len(field), generator=torch.Generator().manual_seed(3), dtype=F64)
    step = 1e-4
    apart = maximised(written, written.w + step * x, a, rho)
    apart = (apart - maximised(written, written.w - step * x, a, rho)) / (2 * step)
    near(field.matvec(x), apart, 1e-5)
    dense = field.dense()
    near(dense, dense.T, 1e-9)
    bump = torch.zeros_like(a)
    bump[3] = step
    apart = maximised(written, written.w, a + bump, rho)
    apart = (apart - maximised(written, written.w, a - bump, rho)) / (2 * step)
    assert float(apart @ x) == pytest.approx(float(field.source_dots(x)[3]), rel=1e-5)
    assert float(field.source(bump) @ x) == pytest.approx(step * float(apart @ x), rel=1e-5)


# --- limits and identities ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["field", "frozen", "objective", "envelope"])
def test_small_radii_lead_to_the_plain_hessian(mode):
    model, data = network(), batches()
    x = torch.randn(len(SAMField(model, classification(), data, 0.0)), dtype=F64)

    def product(rho, mode=mode):
        return SAMField(model, classification(), data, rho, DECAY, mode=mode).matvec(x)

    plain = product(0.0, "field")
    written = Written(model, data, 0.0)
    a = torch.ones(written.count, dtype=F64)
    near(plain, hessian(written.worst)(written.w, a) @ x)
    apart = [float((product(rho) - plain).norm()) for rho in (1e-3, 1e-4)]
    assert apart[0] / apart[1] == pytest.approx(10, rel=0.05)


def test_sources_add_up_to_the_gradient():
    """All samples together scale the loss, which moves no perturbation but for c."""
    field = SAMField(network(), classification(), batches(), 0.3)
    y = torch.randn(len(field), generator=torch.Generator().manual_seed(4), dtype=F64)
    assert float(field.source_dots(y).sum()) == pytest.approx(float(field.residual() @ y), rel=1e-9)


def test_equal_samples_have_equal_sources_in_any_order():
    data = batches((6,))
    x, y = data[0]
    x[4], y[4] = x[1], y[1]
    direction = torch.randn(43, generator=torch.Generator().manual_seed(4), dtype=F64)
    model = network()
    found = SAMField(model, classification(), data, 0.3).source_dots(direction)
    assert float(found[4]) == pytest.approx(float(found[1]), rel=1e-12)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    other = SAMField(model, classification(), [(x[order], y[order])], 0.3).source_dots(direction)
    near(other, found[order])


def test_one_batch_is_all_data():
    model, data = network(), batches((7,))
    one, other = (
        SAMField(model, classification(), data, 0.3, DECAY, perturbation=kind).dense()
        for kind in ("full", "minibatch")
    )
    assert torch.equal(one, other)


def test_kappa():
    field = SAMField(network(), classification(), batches((9,)), 0.3)
    found = field.perturbations[0]
    written = Written(field.vector._module.model, batches((9,)), 0.0)
    h = hessian(lambda w: written.losses(w, *written.groups[0][:2]).mean())(field.weights)
    unit = found.gradient / found.gradient.norm()
    p = torch.eye(len(field), dtype=F64) - torch.outer(unit, unit)
    largest = torch.linalg.eigvalsh(p @ h @ p).abs().max()
    wanted = float(largest) * 0.3 / float(found.gradient.norm())
    assert field.kappa(steps=300) == pytest.approx(wanted, rel=1e-3)


# --- fixed points --------------------------------------------------------------------------------


def fixed_point(model, data, rho, decay, weights=None, steps=60):
    """Newton's method on G, from the model's weights on."""
    for _ in range(steps):
        field = SAMField(
            model, classification(), data, rho, decay, perturbation="full", sample_weights=weights
        )
        residual = field.residual()
        if residual.norm() < 1e-13:
            return field
        field.vector.write(field.weights - torch.linalg.solve(field.dense(), residual))
    raise AssertionError(float(residual.norm()))


def trained(rho, decay):
    """Logistic regression at a fixed point of SAM."""
    torch.manual_seed(0)
    data = batches((20,), seed=7)
    model = torch.nn.Linear(4, 3).to(F64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        decayed = sum((p**2).sum() for p in model.parameters())
        loss = cross_entropy(model(data[0][0]), data[0][1]) + decay * decayed / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, data, fixed_point(model, data, rho, decay)


@pytest.mark.parametrize("rho", [0.05, 0.2])
def test_how_a_fixed_point_moves_with_a_sample(rho):
    decay = 0.2
    model, data, field = trained(rho, decay)
    assert field.stationarity() < 1e-11
    a = torch.ones(20, dtype=F64)
    for sample in (0, 7):
        moved = []
        for step in (1e-4, -1e-4):
            weights = a.clone()
            weights[sample] += step
            moved.append(fixed_point(copy.deepcopy(model), data, rho, decay, weights).weights)
        apart = (moved[0] - moved[1]) / 2e-4
        # dw/da = -C^-1 dG/da, whose columns are asked for one by one
        eye = torch.eye(len(field), dtype=F64)
        source = torch.stack([field.source_dots(column)[sample] for column in eye])
        near(-torch.linalg.solve(field.dense(), source), apart, 1e-5)


def test_stationarity_tells_of_a_point_that_is_none():
    assert SAMField(network(), classification(), batches(), 0.3, DECAY).stationarity() > 0.1


# --- bad input -----------------------------------------------------------------------------------


def test_regression_and_mappings():
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(x)

    model = Net().to(F64)
    x, y = torch.randn(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    given = [{"x": x, "labels": y}]
    one = SAMField(model, regression(), given, 0.1, DECAY).dense()
    other = SAMField(model, regression(), [(x, y)], 0.1, DECAY).dense()
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="batch: expected a key 'labels'"):
        SAMField(model, regression(), [{"x": x}], 0.1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rho": -1.0}, "rho: expected a number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected"),
        ({"data": []}, "data: expected at least one sample"),
        ({"mode": "hessian"}, "mode: expected one of field, frozen"),
        ({"perturbation": "batch"}, "perturbation: expected one of minibatch"),
        ({"mode": "envelope", "adaptive": True}, "mode: expected field, frozen or objective"),
        ({"mode": "envelope", "rho": 0.0}, "mode: expected field, frozen or objective"),
        ({"sample_weights": torch.ones(3)}, r"sample_weights: expected \(16,\), got"),
    ],
)
def test_what_is_refused(changes, match):
    given = {"data": batches(), "rho": 0.1} | changes
    with pytest.raises(ValueError, match=match):
        SAMField(network(), classification(), given.pop("data"), given.pop("rho"), **given)


def test_models_that_are_refused():
    model = network()
    with pytest.raises(ValueError, match="model: expected float32 or float64"):
        SAMField(model.bfloat16(), classification(), [(torch.randn(2, 4).bfloat16(),
                                                       torch.tensor([0, 1]))], 0.1)  # fmt: skip
    model = network()
    model[0].float()
    with pytest.raises(ValueError, match="model: expected parameters of one kind"):
        SAMField(model, classification(), batches(), 0.1)
    with pytest.raises(ValueError, match="model: expected parameters that need a gradient"):
        SAMField(network().requires_grad_(False), classification(), batches(), 0.1)


def test_no_maximum_nearby():
    """Where curvature is larger than the slope, steps to the maximum go to and fro."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False).to(F64)
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=F64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-3, 0.0]]))
    field = SAMField(model, regression(), [(x, torch.zeros(2, 1, dtype=F64))], 5.0, mode="envelope")
    # the gradient has no part along the steep axis: the ascent stays at a saddle
    x = torch.from_numpy(np.array([0.0, 1.0]))
    with pytest.raises(ConvergenceError):
        field.matvec(x)
