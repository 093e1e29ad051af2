"""Kronecker factors of SAM's Jacobian: exact where they can be, and near where they are offered."""

import pytest
import torch
from sam_if import EKFAC, HessianInfluence, SAMField, causal_lm, classification, regression
from sam_if.layers import capture, layers_of
from sam_if.objective import ParameterVector
from shared_kernels.testing.models import tiny_model
from sklearn.datasets import load_digits
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

F64 = torch.float64


def linear(outputs=1, bias=True, count=30, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, outputs, bias=bias).to(F64)
    x = torch.randn(count, 5, dtype=F64)
    return model, (x, torch.randn(count, outputs, dtype=F64))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("mode", ["field", "frozen"])
def test_exact_where_hessians_have_one_basis(mode, rho, bias):
    """Of least squares with one output the factors are the Hessian, at any weights."""
    model, data = linear(bias=bias)
    field = SAMField(model, regression(), [data], rho, 0.05, mode=mode, perturbation="full")
    near = EKFAC(field)
    x = torch.randn(len(field), dtype=F64, generator=torch.Generator().manual_seed(3))
    matrix = field.dense()
    for transposed in (False, True):
        wanted = torch.linalg.solve(matrix.T if transposed else matrix, x)
        torch.testing.assert_close(near.solve(x, transposed=transposed), wanted, rtol=1e-10,
                                   atol=1e-12)  # fmt: skip
    if rho and mode == "field":
        # what couples all parameters matters
        near._rank_one = None
        assert (near.solve(x) - torch.linalg.solve(matrix, x)).norm() > 1e-3 * x.norm()


def test_scores_are_those_of_the_matrix():
    model, data = linear()
    field = SAMField(model, regression(), [data], 0.3, 0.05, perturbation="full")
    with pytest.warns(UserWarning, match="no fixed point"):
        wanted = HessianInfluence(field, "dense").scores([data])
        found = HessianInfluence(field, "ekfac").scores([data])
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-8, atol=1e-12)
    assert found.method == "hessian, field, ekfac"


def test_damping_is_on_the_diagonal():
    model, data = linear()
    field = SAMField(model, regression(), [data], 0.3, 0.05, perturbation="full")
    x = torch.randn(len(field), dtype=F64)
    wanted = torch.linalg.solve(field.dense() + 0.7 * torch.eye(len(field), dtype=F64), x)
    torch.testing.assert_close(EKFAC(field, damping=0.7).solve(x), wanted, rtol=1e-10, atol=1e-12)


def test_weights_of_samples_count():
    model, data = linear()
    weights = torch.rand(30, dtype=F64)
    weights[:3] = 0
    field = SAMField(model, regression(), [data], 0.3, 0.05, perturbation="full",
                     sample_weights=weights)  # fmt: skip
    x = torch.randn(len(field), dtype=F64)
    wanted = torch.linalg.solve(field.dense(), x)
    torch.testing.assert_close(EKFAC(field).solve(x), wanted, rtol=1e-10, atol=1e-12)


def gauss_newton(model, objective, field, at, batch):
    """The matrix by definition, of cross entropy."""
    vector = field.vector
    names = vector.names

    def logits(w):
        parts = dict(zip(names, w.split(vector.sizes), strict=True))
        parts = {n: p.view(s) for (n, p), s in zip(parts.items(), vector.shapes, strict=True)}
        return functional_call(model, parts, (batch[0],))

    j = jacrev(logits)(at)
    p = logits(at).softmax(-1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("bcp,bcd,bdq->pq", j, inner, j) / len(batch[0])


def digits(count=300):
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:count]) / 16, torch.from_numpy(y[:count]).long()


def trained(rho, data, steps=300):
    from sam_if import SAM

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 8), torch.nn.GELU(), torch.nn.Linear(8, 10)
    ).to(F64)  # fmt: skip
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho, lr=0.5, momentum=0.9,
                    weight_decay=0.01)  # fmt: skip
    for _ in range(steps):
        for step in (optimizer.first_step, optimizer.second_step):
            cross_entropy(model(data[0]), data[1]).backward()
            step(zero_grad=True)
    return model


@pytest.mark.parametrize("batches", [1, 3])
def test_near_the_gauss_newton_field_of_a_network(batches):
    """Of a network on digits: the direction of solutions, beside that of the matrix itself."""
    x, y = digits()
    model = trained(0.1, (x, y))
    parts = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    kind = "full" if batches == 1 else "minibatch"
    field = SAMField(model, classification(), parts, 0.1, 0.01, perturbation=kind)
    near = EKFAC(field, draws=4)
    matrix = 0.01 * torch.eye(len(field), dtype=F64)
    for batch, found in zip(parts, field.perturbations, strict=True):
        h = gauss_newton(model, field, field, field.weights, batch)
        moved = gauss_newton(model, field, field, field.weights + found.epsilon, batch)
        u = found.direction
        p = torch.eye(len(u), dtype=F64) - torch.outer(u, u)
        matrix += (moved + found.scale * moved @ p @ h) / batches
    draws = torch.Generator().manual_seed(1)
    asked = [grad(lambda w, q=q: field.vector.losses(w, (x, y))[q])(field.weights)
             for q in range(10)]  # fmt: skip
    drawn = [torch.randn(len(field), dtype=F64, generator=draws) for _ in range(10)]

    def near_to(matrix, right, solve):
        return sum(
            float(torch.cosine_similarity(solve(b), torch.linalg.solve(matrix.T, b), dim=0))
            for b in right
        ) / len(right)  # fmt: skip

    def solve(b):
        return near.solve(b, transposed=True)

    assert near_to(matrix, drawn, solve) > 0.95
    # of gradients, whose parts in steep directions are large: what leaves out products of layers
    # is at .95, and the identity at .34
    found = near_to(matrix, asked, solve)
    assert found > 0.8
    assert found > 2 * near_to(matrix, asked, lambda b: b)


# --- drawn labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "regression", "mean", "token", "sum"])
def test_drawn_gradients_have_the_curvature_as_second_moment(kind):
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    if kind == "classification":
        outputs, target = torch.randn(3, 4, dtype=F64), torch.tensor([0, 1, 3])
        objective = classification()
    elif kind == "regression":
        outputs, target = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64)
        objective = regression()
    else:
        outputs, target = torch.randn(2, 4, 3, dtype=F64), torch.randint(3, (2, 4))
        target[0, 2] = -100
        objective = causal_lm(level=kind)
    flat = outputs.flatten(1)

    def loss(o):
        return objective.of_outputs(o.view_as(outputs), target)

    rows, count = range(len(target)), 4000
    wanted = [torch.func.hessian(lambda o, b=b: loss(o)[b])(flat)[b, :, b] for b in rows]
    # as many draws of each sample at once
    many = outputs.repeat(count, *[1] * (outputs.dim() - 1))
    labels = target.repeat(count, *[1] * (target.dim() - 1))
    drawn = grad(lambda o: objective.drawn(o, labels, draws).sum())(many)
    drawn = drawn.view(count, len(target), -1)
    found = torch.einsum("nbi,nbj->bij", drawn, drawn) / count
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 0.06 * other.abs().max()
    assert drawn.mean(0).abs().max() < 0.05


def test_objectives_without_labels_to_draw_are_refused():
    model, data = linear()

    class Own:
        def losses(self, model, batch):
            return (model(batch[0]) - batch[1]).square().sum(-1)

        measure = losses

    field = SAMField(model, Own(), [data], 0.1, 0.05)
    with pytest.raises(ValueError, match="objective: expected one with pseudo, got str 'Own'"):
        EKFAC(field)
    for options, match in (
        ({"adaptive": True}, "mode field or frozen, of SAM, got str 'adaptive'"),
        ({"mode": "objective"}, "got str 'objective'"),
    ):
        with pytest.raises(ValueError, match=match):
            EKFAC(SAMField(model, regression(), [data], 0.1, 0.05, **options))
    field = SAMField(model, regression(), [data], 0.1, 0.05)
    with pytest.raises(ValueError, match="draws: expected"):
        EKFAC(field, draws=0)


# --- what layers see -----------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A convolution, a layer that is called twice, a norm, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1, stride=2, dilation=1)
        self.norm = torch.nn.LayerNorm(4)
        self.twice = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(12, 3, bias=False)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        h = self.conv(x).flatten(2)
        h = torch.tanh(self.twice(self.norm(h)))
        h = self.twice(h)
        return self.head(h.flatten(1))


def test_gradients_of_samples_are_products_of_what_layers_see():
    torch.manual_seed(0)
    model = Small().to(F64)
    batch = (torch.randn(5, 2, 4, 4, dtype=F64), torch.randint(3, (5,)))
    objective = classification()
    vector = ParameterVector(model, objective)
    layers, rest = layers_of(model, vector)
    assert [layer.name for layer in layers] == ["conv", "twice", "head", "unused"]
    assert rest == ["norm.weight", "norm.bias"]
    at = vector.read()
    seen, whole = capture(layers, lambda w: vector.losses(w, batch).sum(), at, 5)
    each = vmap(
        lambda n: grad(lambda w: vector.losses(w, (batch[0][n][None], batch[1][n][None]))[0])(at)
    )(torch.arange(5))
    torch.testing.assert_close(whole, each.sum(0))
    for layer, (x, d) in zip(layers, seen, strict=True):
        for sample in range(5):
            wanted = layer.matrix(each[sample])
            torch.testing.assert_close(d[sample].T @ x[sample], wanted, rtol=1e-10, atol=1e-14)
    back = torch.zeros_like(at)
    for layer in layers:
        layer.put(back, layer.matrix(at))
    norms = torch.cat([torch.zeros_like(at[: layers[0].weight.stop + 3]), torch.ones(8)])
    assert torch.equal(back[norms.numel() :], at[norms.numel() :])


def test_language_models_and_tied_weights():
    torch.manual_seed(0)
    model = tiny_model("llama", tie_word_embeddings=True).to(F64)
    model.config._attn_implementation = "eager"
    vector = ParameterVector(model, causal_lm())
    layers, rest = layers_of(model, vector)
    assert all("embed" not in layer.name for layer in layers if layer.name != "lm_head")
    ids = torch.randint(3, 60, (3, 6))
    field = SAMField(model, causal_lm(), [{"input_ids": ids, "labels": ids}], 0.05, 0.1)
    near = EKFAC(field)
    x = torch.randn(len(field), dtype=F64)
    assert near.solve(x).isfinite().all()
    y = torch.randn(len(field), dtype=F64)
    torch.testing.assert_close(near.solve(x) @ y, x @ near.solve(y, transposed=True))
    assert set(rest) >= {name for name in vector.names if "norm" in name}


def test_layers_without_samples_are_refused():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(len(x), -1, 3).sum(1)

    model = Flat().to(F64)
    batch = (torch.randn(3, 2, 4, dtype=F64), torch.tensor([0, 1, 2]))
    field = SAMField(model, classification(), [batch], 0.1, 0.05)
    with pytest.raises(ValueError, match="layers with 3 samples in the first dimension, got"):
        EKFAC(field)
