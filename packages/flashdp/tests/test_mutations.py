"""Checks of what privacy rests on, each shown to fail when the thing it checks is broken."""

from __future__ import annotations

import math
from dataclasses import replace

import flashdp.collector
import flashdp.records
import pytest
import torch
from flashdp.collector import Collector
from flashdp.engine import PrivacyEngine
from flashdp.errors import PrivacyError
from flashdp.noise import NoiseSource
from flashdp.units import Units
from torch import nn

SIGMA, C, B = 1.3, 0.7, 8.0


class Net(nn.Module):
    """Three matrices and a norm; one loss per row."""

    def __init__(self):
        super().__init__()
        self.first, self.mid = nn.Linear(6, 90), nn.Linear(90, 90)
        self.norm, self.last = nn.LayerNorm(90), nn.Linear(90, 40, bias=False)

    def forward(self, x):
        x = self.norm(torch.tanh(self.mid(torch.tanh(self.first(x)))))
        return self.last(x).square().sum((1, 2))


def make(sigma=0.0):
    torch.manual_seed(0)
    model = Net()
    engine = PrivacyEngine(secure_rng=False, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.make_private(
        model, optimizer, noise_multiplier=sigma, max_grad_norm=C, expected_batch_size=B,
        strategy="gram", check_independence=False,
    )  # fmt: skip
    return model, engine, optimizer


def data(rows=5):
    return torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(1))


def released(model, optimizer):
    """B times what a step subtracts from each parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    return [(old - p.detach()) * B for p, old in zip(model.parameters(), before, strict=True)]


def sums_of(model, engine, x):
    model(x).sum().backward()
    sums = engine.collector.take()
    return [sums[p] for p in model.parameters()]


def check_noise():
    """Every parameter's noise has the deviation sigma C, within four of its own."""
    model, _, optimizer = make(SIGMA)
    for noise in released(model, optimizer):
        spread = SIGMA * C / math.sqrt(2 * noise.numel())
        found = float(noise.square().mean().sqrt())
        assert abs(found - SIGMA * C) < 4 * spread, f"noise of {found}"


def check_sensitivity():
    """Leaving a unit out moves every group by no more than C_k, and all by no more than C."""
    model, engine, _ = make()
    x = data() * 10
    full = sums_of(model, engine, x)
    for unit in range(len(x)):
        rest = sums_of(model, engine, x[torch.arange(len(x)) != unit])
        moved = [float((a - b).norm()) for a, b in zip(full, rest, strict=True)]
        total = math.hypot(*moved)
        assert total <= C * (1 + 2e-6), f"moved by {total}"
        assert total > 0.99 * C


def check_divisor():
    """The released mean is the sum over B, whatever was drawn."""
    for rows in (2, 5, 8):
        model, engine, optimizer = make()
        sums = sums_of(model, engine, data(rows))
        model(data(rows)).sum().backward()
        for found, expected in zip(released(model, optimizer), sums, strict=True):
            assert float((found - expected).norm()) < 1e-4 * float(expected.norm()), "divisor"


def check_invariance():
    """A batch in two parts gives the same sum."""
    model, engine, _ = make()
    x = data()
    whole = sums_of(model, engine, x)
    model(x[:2]).sum().backward()
    for found, expected in zip(sums_of(model, engine, x[2:]), whole, strict=True):
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm()), "parts"


CHECKS = [check_noise, check_sensitivity, check_divisor, check_invariance]


@pytest.mark.parametrize("check", CHECKS)
def test_checks_hold(check):
    check()


def scaled_noise(factor):
    original = NoiseSource.noised

    def noised(self, sums, **kwargs):
        return original(self, (replace(s, std=s.std * factor(s.uid)) for s in sums), **kwargs)

    return noised


def halved_noise(patch):
    patch.setattr(NoiseSource, "noised", scaled_noise(lambda uid: 0.5))


def one_layer_without_noise(patch):
    patch.setattr(NoiseSource, "noised", scaled_noise(lambda uid: float(uid != 4)))


def smaller_norms(patch):
    original = flashdp.collector.clip_factors

    def factors(n2, *args, **kwargs):
        return original(n2 * 0.9**2, *args, **kwargs)

    patch.setattr(flashdp.collector, "clip_factors", factors)


def smaller_norms_of_matrices(patch):
    original = flashdp.records.segment_gram_clip

    def clip(a, g, cu, threshold, *args, **kwargs):
        return original(a, g, cu, threshold / 0.9, *args, **kwargs)

    patch.setattr(flashdp.records, "segment_gram_clip", clip)


def full_threshold_for_each_group(patch):
    original = flashdp.collector.clip_factors

    def factors(n2, threshold, *args, **kwargs):
        # Those of the attach-time comparison with autograd are infinite.
        return original(n2, torch.where(threshold.isinf(), threshold, C), *args, **kwargs)

    patch.setattr(flashdp.collector, "clip_factors", factors)


def realised_batch(patch):
    original = PrivacyEngine._before_step

    def before_step(self):
        if self.collector._units is not None:
            self.expected_batch_size = float(self.collector._units.rows)
        original(self)

    patch.setattr(PrivacyEngine, "_before_step", before_step)


def clipped_batch(patch):
    original = Collector.begin

    def begin(self, units, *args):
        # Not in the attach-time comparison, which would find it.
        if not self.thresholds.isinf().all():
            units = Units.grouped(torch.tensor([0, units.rows]), units.cu_rows.device)
        original(self, units, *args)

    patch.setattr(Collector, "begin", begin)


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (halved_noise, check_noise),
        (one_layer_without_noise, check_noise),
        (smaller_norms, check_sensitivity),
        (smaller_norms_of_matrices, check_sensitivity),
        (full_threshold_for_each_group, check_sensitivity),
        (realised_batch, check_divisor),
        (clipped_batch, check_invariance),
    ],
)
def test_a_mutation_is_found_out(monkeypatch, mutate, check):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"noise of|moved by|divisor|parts"):
        check()


# -- leaks that were found, and are refused --------------------------------------------------------


def test_a_batch_is_not_tried_again_after_its_backward_failed():
    """Layers behind the failure have been summed: the second try would count the unit twice."""
    model, _, _ = make()

    def out_of_memory(grad):
        raise RuntimeError("out of memory")

    def fail(module, args, out):
        out.register_hook(out_of_memory)

    hook = model.mid.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(data(1)).sum().backward()
    hook.remove()
    with pytest.raises(PrivacyError, match="after one that failed"):
        model(data(1))


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_positions_are_not_taken_for_ids_of_rows(rows):
    """With as many rows as tokens, each position would be a unit and hold all units' gradients."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.position = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, tokens):
            x = self.table(tokens) + self.position(torch.arange(tokens.shape[1]))
            return torch.tanh(x).sum((1, 2)) * 1e3

    torch.manual_seed(0)
    model = Positions()
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=C,
        expected_batch_size=B,
    )  # fmt: skip
    tokens = torch.randint(0, 9, (rows, 4))
    if rows == 4:
        with pytest.raises(PrivacyError, match=r"'position' looks up consecutive ids"):
            model(tokens)
        return
    full = sums_of(model, engine, tokens)
    for unit in range(rows):
        rest = sums_of(model, engine, tokens[torch.arange(rows) != unit])
        moved = math.hypot(*(float((a - b).norm()) for a, b in zip(full, rest, strict=True)))
        assert moved <= C * (1 + 1e-5)


def test_what_is_unfrozen_later_does_not_train():
    model = nn.Sequential(nn.Linear(6, 3), nn.PReLU())
    model[1].requires_grad_(False)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.make_private(
        model, optimizer, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=B
    )
    model[1].requires_grad_(True)
    model(data()[:, 0]).sum().backward()
    with pytest.raises(PrivacyError, match=r"shape \(1,\), have a gradient"):
        optimizer.step()
