"""Clipped sums against Opacus and Opake, which form every unit's gradient, and fastDP's split."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings

import pytest
import torch
from flashdp.engine import PrivacyEngine
from torch import nn

ROWS = 6
OPACUS_EPS = 1e-6
"""Opacus clips by C / (n + 1e-6)."""

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="opacus is missing"),
]


class Patches(nn.Module):
    """A small vision-language transformer block of layers that both sides know."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.table = nn.Embedding(13, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image, tokens):
        x = torch.cat([self.patch(image).flatten(2).transpose(1, 2), self.table(tokens)], 1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.last(x + self.down(torch.tanh(self.up(x)))).mean(1))


def batch():
    g = torch.Generator().manual_seed(5)
    image = torch.randn(ROWS, 3, 4, 6, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, 13, (ROWS, 7), generator=g)
    # Losses of different size, so that a threshold clips some units and not others.
    weights = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)
    return image, tokens, torch.randint(0, 5, (ROWS,), generator=g), weights


def losses(logits, labels, weights):
    return nn.functional.cross_entropy(logits, labels, reduction="none") * weights


def twins():
    torch.manual_seed(3)
    model = Patches().double().train()
    return model, copy.deepcopy(model)


def ours(model, max_grad_norm, grouping):
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0,
        max_grad_norm=max_grad_norm, expected_batch_size=1.0, grouping=grouping,
    )  # fmt: skip
    image, tokens, labels, weights = batch()
    losses(model(image, tokens), labels, weights).sum().backward()
    return {engine._parameters[p]: s for p, s in engine.collector.take().items()}


def assert_agrees(found, expected, groups, bounds):
    """Within what the two definitions differ by.

    We scale every factor by 1 - 2^-16, which is undone here. A unit of norm n >= C is scaled by
    C / (n + eps) there and by C / n here, so its contributions differ by at most
    C eps / (n + eps) <= eps in norm; a unit between C - eps and C by no more. Summed: ROWS * eps.
    Our thresholds are rounded to float32, which moves each contribution by at most 2^-24 of C.
    """
    assert found.keys() == expected.keys()
    for names, bound in zip(groups, bounds, strict=True):
        difference = torch.cat(
            [(found[n] / (1 - 2**-16) - expected[n]).flatten() for n in names]
        ).norm()
        size = torch.cat([expected[n].flatten() for n in names]).norm()
        allowed = ROWS * (OPACUS_EPS + bound * 2**-24) + 1e-9 * float(size)
        assert float(difference) <= allowed, names
        assert float(difference) <= 1e-5 * max(1.0, float(size)), names


def thresholds_of(model):
    """One threshold for each parameter, near the middle of the units' norms."""
    image, tokens, labels, weights = batch()
    norms = {n: [] for n, _ in model.named_parameters()}
    for i in range(ROWS):
        model.zero_grad()
        losses(model(image, tokens), labels, weights)[i].backward()
        for name, param in model.named_parameters():
            norms[name].append(float(param.grad.norm()))
    model.zero_grad()
    return [sorted(v)[ROWS // 2] * (0.9 + 0.02 * k) for k, v in enumerate(norms.values())]


def test_every_parameter_is_clipped_as_by_opacus_per_layer():
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer

    model, other = twins()
    bounds = thresholds_of(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = GradSampleModule(other, loss_reduction="sum")
        image, tokens, labels, weights = batch()
        losses(hooked(image, tokens), labels, weights).sum().backward()
    peer = DPPerLayerOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=bounds,
        expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    peer.clip_and_accumulate()
    expected = {n: p.summed_grad for n, p in other.named_parameters()}
    # Thresholds are ours in the order of our groups, Opacus's in the order of its parameters.
    order = [name for name, _ in model.named_parameters()]
    found = ours(model, bounds, "param")
    assert list(found) and set(found) == set(order)
    assert_agrees(found, expected, [[n] for n in order], bounds)


@pytest.mark.skipif(importlib.util.find_spec("opake") is None, reason="opake is missing")
def test_every_parameter_is_clipped_as_by_opake_per_group():
    from opake.dpsgd.clipping import clipped_grad, per_group

    model, other = twins()
    bounds = thresholds_of(copy.deepcopy(model))
    params = {name: param.detach() for name, param in other.named_parameters()}

    def loss(params, image, tokens, label, weight):
        logits = torch.func.functional_call(other, params, (image[None], tokens[None]))
        return losses(logits, label[None], weight[None])[0]

    groups = per_group(params, patterns=dict(zip(params, bounds, strict=True)))
    clipped, state = clipped_grad(loss, clipping_norm=groups, batch_argnums=(1, 2, 3, 4))
    found, _ = clipped(params, *batch(), state=state)
    assert_agrees(ours(model, bounds, "param"), found.pytree, [[n] for n in params], bounds)


def flat_bound():
    model, _ = twins()
    each = thresholds_of(model)
    return math.sqrt(sum(c * c for c in each))


@pytest.mark.parametrize("ghost", [False, True])
def test_a_whole_unit_is_clipped_as_by_opacus_flat(ghost):
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model, other = twins()
    bound = flat_bound()
    image, tokens, labels, weights = batch()
    options = {"noise_multiplier": 0.0, "max_grad_norm": bound, "expected_batch_size": 1}
    inner = torch.optim.SGD(other.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ghost:
            hooked = GradSampleModuleFastGradientClipping(
                other, max_grad_norm=bound, use_ghost_clipping=True, loss_reduction="sum"
            )
            peer = DPOptimizerFastGradientClipping(inner, loss_reduction="sum", **options)
            criterion = DPLossFastGradientClipping(
                hooked, peer, _Criterion(weights), loss_reduction="sum"
            )
            criterion(hooked(image, tokens), labels).backward()
            expected = {n: p.grad for n, p in other.named_parameters()}
        else:
            hooked = GradSampleModule(other, loss_reduction="sum")
            losses(hooked(image, tokens), labels, weights).sum().backward()
            peer = DPOptimizer(inner, loss_reduction="sum", **options)
            peer.clip_and_accumulate()
            expected = {n: p.summed_grad for n, p in other.named_parameters()}
    found = ours(model, bound, "flat")
    assert_agrees(found, expected, [list(expected)], [bound])


class _Criterion:
    """What Opacus asks of a loss: a reduction of its own, and one loss per unit."""

    reduction = "sum"

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, logits, labels):
        return losses(logits, labels, self.weights)


def test_the_split_of_c_is_fastdps_layer_wise_one():
    """FastDP clips each layer, weight and bias together, at C / sqrt(layers)."""
    model, plain = twins()
    bound, layers = 0.8, 8
    found = ours(model, bound, "module")
    image, tokens, labels, weights = batch()
    expected = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    for i in range(ROWS):
        plain.zero_grad()
        losses(plain(image, tokens), labels, weights)[i].backward()
        for module in plain.children():
            own = list(module.parameters())
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in own))
            for name, param in plain.named_parameters():
                if any(param is p for p in own):
                    factor = min(1.0, bound / math.sqrt(layers) / norm)
                    expected[name] += factor * param.grad
    assert len(list(plain.children())) == layers
    for name, value in expected.items():
        # Thresholds are rounded to float32, and each of the ROWS contributions with them.
        torch.testing.assert_close(
            found[name] / (1 - 2**-16), value, rtol=0, atol=ROWS * bound * 2**-24
        )
