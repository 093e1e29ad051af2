"""AdamWBC: AdamW without noise, and unbiased second moments with it."""

import copy
import math

import pytest
import torch
from flashdp import AdamWBC, AdaptiveThresholds, PrivacyEngine
from torch import nn

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def params(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in ((5, 3), (7,), (1,))]


def feed(parameters, step):
    g = torch.Generator().manual_seed(100 + step)
    for k, param in enumerate(parameters):
        # One of them skips steps.
        param.grad = torch.randn(param.shape, generator=g).to(param) if (k + step) % 3 else None


def test_without_noise_it_is_adamw():
    ours, theirs = params(), params()
    optimizers = AdamWBC(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(20):
        for own, optimizer in zip((ours, theirs), optimizers, strict=True):
            feed(own, step)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_formula_step_by_step():
    """One coordinate, by hand; the variance changes on the way."""
    (beta1, beta2), lr, floor = (0.8, 0.95), 1e-2, 0.2
    param = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    optimizer = AdamWBC([param], **OPTIONS, floor=floor)
    x, m, v, phi = 0.3, 0.0, 0.0, 0.0
    for step in range(1, 40):
        grad, std = math.sin(step), 0.5 + 0.01 * step
        optimizer.set_noise({param: std})
        param.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        phi = beta2 * phi + (1 - beta2) * std**2
        noise = phi / (1 - beta2**step)
        second = max(v / (1 - beta2**step) - noise, floor * noise)
        x *= 1 - lr * 0.1
        x -= lr * m / (1 - beta1**step) / (math.sqrt(second) + 1e-6)
        assert float(param.detach()) == pytest.approx(x, rel=1e-12)


def test_the_second_moment_is_that_of_the_signal():
    """Gradients of size 0.5 under noise of deviation 1: Adam sees 1.25, and this 0.25."""
    count, std = 20_000, 1.0
    param = nn.Parameter(torch.zeros(count))
    optimizer = AdamWBC([param], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0, floor=1e-6)
    optimizer.set_noise({param: std})
    g = torch.Generator().manual_seed(1)
    for _ in range(400):
        param.grad = 0.5 + std * torch.randn(count, generator=g)
        optimizer.step()
    state = optimizer.state[param]
    start = 1 - 0.999 ** state["step"]
    found = state["exp_avg_sq"].double().mean() / start - state["noise_sq"] / start
    assert float(found) == pytest.approx(0.25, abs=4 * 1.5 / math.sqrt(400 * count / 2))


def test_the_engine_tells_the_noise_and_follows_thresholds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = AdamWBC(model.parameters(), lr=1e-2)
    engine = PrivacyEngine(secure_rng=False, seed=1)
    engine.make_private(
        model, optimizer, noise_multiplier=0.7, max_grad_norm=2.0, expected_batch_size=5.0,
        thresholds=AdaptiveThresholds(), check_independence=False,
    )  # fmt: skip
    told = []
    for step in range(3):
        expected = engine.calibration.noise_std(engine._sigma)
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        told.append(dict(optimizer._noise))
        assert told[step] == {p: pytest.approx(s / 5.0) for p, s in expected.items()}
        assert told[step].keys() == set(model.parameters())
    assert told[0] != told[2]


def test_a_resumed_run_equals_an_unbroken_one_in_16_bits():
    def run(parameters, optimizer, steps):
        optimizer.set_noise(dict.fromkeys(parameters, 0.3))
        for step in steps:
            feed(parameters, step)
            optimizer.step()

    whole = params(torch.bfloat16)
    run(whole, AdamWBC(whole, **OPTIONS), range(6))
    halves = params(torch.bfloat16)
    first = AdamWBC(halves, **OPTIONS)
    run(halves, first, range(3))
    second = AdamWBC(halves, **OPTIONS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(s["exp_avg_sq"].dtype is torch.float32 for s in second.state.values())
    run(halves, second, range(3, 6))
    for one, other in zip(halves, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -1.0}, {"floor": 0.0}],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdamWBC(params(), **wrong)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        AdamWBC(params()).step(lambda: 0.0)
