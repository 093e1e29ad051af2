"""Modules that users cover by a rule of their own."""

import pytest
import torch
from flashdp import PrivacyEngine, PrivacyError, register_dp_rule
from flashdp.rules import base
from torch import nn

C, ROWS = 0.4, 5


class Mixer(nn.Module):
    """A matrix over positions and a gain, as no built-in rule has them."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.einsum("st,bth->bsh", self.mix, x) * self.gain


class Subclass(Mixer):
    """Might do anything else in its forward."""


def mixed(module, parameters, x):
    mix, gain = parameters["mix"], parameters["gain"]
    return torch.einsum("bst,bth->bsh", mix, x) * gain[:, None]


def leaking(module, parameters, x):
    """Uses the first row's copy for all rows."""
    return torch.einsum("st,bth->bsh", parameters["mix"][0], x) * parameters["gain"][:, None]


def unlike(module, parameters, x):
    return 2 * mixed(module, parameters, x)


def inputs(module, generator):
    return torch.randn(2, 3, 8, generator=generator)


@pytest.fixture(autouse=True)
def own_rules(monkeypatch):
    base.find_rule(nn.Identity())
    monkeypatch.setattr(base, "_RULES", list(base._RULES))


def net():
    torch.manual_seed(0)
    shared = Mixer().double()
    return nn.Sequential(nn.Linear(8, 8).double(), shared, nn.Tanh(), shared)


def private(model, **options):
    engine = PrivacyEngine(secure_rng=False, seed=1)
    engine.make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0,
        max_grad_norm=C, expected_batch_size=1.0, **options,
    )  # fmt: skip
    return engine


def test_a_registered_module_is_clipped_as_autograd_says():
    """Used twice, its gradients add up within each unit before they are clipped."""
    register_dp_rule(Mixer, mixed, probe=inputs)
    x = torch.randn(ROWS, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain, model = net(), net()
    expected = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    groups = [["0.weight", "0.bias"], ["1.mix", "1.gain"]]
    for row in x:
        plain.zero_grad()
        plain(row[None]).square().sum().backward()
        grads = {name: p.grad for name, p in plain.named_parameters()}
        for names in groups:
            norm = torch.cat([grads[n].flatten() for n in names]).norm()
            for n in names:
                expected[n] += grads[n] * min(1.0, C / len(groups) ** 0.5 / float(norm))
    engine = private(model)
    assert engine.coverage["1.mix"] == "registered for Mixer"
    model(x).square().sum().backward()
    sums = engine.collector.take()
    for name, param in model.named_parameters():
        torch.testing.assert_close(sums[param], expected[name], rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(leaking, "a row's own gradients of mix differ"), (unlike, "outputs differ")],
)
def test_a_rule_that_is_wrong_is_refused(wrong, reason):
    """Rows that share a copy give the right sum, and would be clipped as one unit."""
    register_dp_rule(Mixer, wrong, probe=inputs)
    with pytest.raises(PrivacyError, match=reason):
        private(net())


def test_a_subclass_is_not_covered():
    register_dp_rule(Mixer, mixed, probe=inputs)
    with pytest.raises(PrivacyError, match=r"register_dp_rule"):
        private(nn.Sequential(Subclass().double()))


def test_a_later_rule_replaces_an_earlier_one():
    register_dp_rule(Mixer, unlike, probe=inputs)
    register_dp_rule(Mixer, mixed, probe=inputs)
    private(net())
