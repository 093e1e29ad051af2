"""Changes of the perturbation against automatic differentiation of its formula, in float64."""

import pytest
import torch
from sam_if.perturbation import Perturbation
from torch.func import jacrev

F64 = torch.float64


def vectors(size=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, size, generator=generator, dtype=F64)


def formula(weights, gradient, rho, adaptive, norm_eps):
    t = weights.abs() if adaptive else torch.ones_like(weights)
    return rho * t**2 * gradient / (((t * gradient) ** 2).sum().sqrt() + norm_eps)


# a constant that is no rounding error: what is exact stays so
@pytest.mark.parametrize("norm_eps", [1e-12, 0.7])
@pytest.mark.parametrize("adaptive", [False, True])
def test_changes_are_derivatives(adaptive, norm_eps):
    w, g, x, y = vectors()
    options = (0.3, adaptive, norm_eps)
    found = Perturbation(w, g, *options)
    torch.testing.assert_close(found.epsilon, formula(w, g, *options), rtol=1e-14, atol=0)
    by_weights, by_gradient = jacrev(formula, argnums=(0, 1))(w, g, *options)
    torch.testing.assert_close(found.tangent(x), by_gradient @ x, rtol=1e-12, atol=1e-14)
    moved = found.tangent(x, y)
    torch.testing.assert_close(moved, by_gradient @ x + by_weights @ y, rtol=1e-12, atol=1e-14)
    gradient, weights = found.adjoint(x)
    torch.testing.assert_close(gradient, by_gradient.T @ x, rtol=1e-12, atol=1e-14)
    if adaptive:
        torch.testing.assert_close(weights, by_weights.T @ x, rtol=1e-12, atol=1e-14)
    else:
        assert weights is None
        assert not by_weights.any()


def test_the_length_is_the_radius():
    w, g, *_ = vectors()
    found = Perturbation(w, g, 0.3)
    assert float(found.epsilon.norm()) == pytest.approx(0.3, rel=1e-11)
    assert float(found.direction.norm()) == pytest.approx(1, rel=1e-14)
    # a loss that is scaled has the same
    torch.testing.assert_close(Perturbation(w, 5 * g, 0.3).epsilon, found.epsilon)


def test_asam_does_not_see_scales_of_weights():
    """Weights times c and gradients over c, as of a layer before another that undoes it."""
    w, g, *_ = vectors()
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1, 7.0], dtype=F64)
    one = Perturbation(w, g, 0.3, adaptive=True).epsilon / w
    other = Perturbation(w * scale, g / scale, 0.3, adaptive=True).epsilon / (w * scale)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_gradient_no_perturbation(adaptive):
    w, _, x, y = vectors()
    found = Perturbation(w, torch.zeros_like(w), 0.3, adaptive)
    gradient, weights = found.adjoint(x)
    for value in (found.epsilon, found.tangent(x), found.tangent(x, y), gradient, weights):
        assert value is None or not value.any()
