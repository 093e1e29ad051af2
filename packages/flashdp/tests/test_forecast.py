"""A forecast counts what the steps do: FLOPs against torch's counter, strategies as planned."""

import pytest
import torch
from flashdp.errors import PrivacyError
from flashdp.forecast import forecast
from shared_kernels.testing.models import tiny_model
from torch import nn

UNITS, TOKENS = 3, 20


def matrices():
    return nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 8, bias=False))


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_an_ordinary_step_are_those_that_torch_counts(frozen):
    from torch.utils.flop_counter import FlopCounterMode

    model = matrices()
    model[0].requires_grad_(not frozen)
    x = torch.randn(UNITS, TOKENS, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    found = forecast(model, units=UNITS, tokens=TOKENS)
    assert found.flops == counter.get_total_flops()


def test_each_strategy_is_counted_as_what_it_does(monkeypatch):
    from flashdp import forecast as module

    name = "gram"
    monkeypatch.setattr(module, "costs", lambda *a, **k: {name: 1.0})
    flops = 2 * UNITS * TOKENS * 24 * 40
    for name, extra, moved, workspace in (
        ("gram", 2 * UNITS * TOKENS**2 * (24 + 40), 0, 8 * TOKENS**2),
        ("recompute", flops, 0, 4 * 24 * 40),
        # The CPU writes, reads and adds one unit's product after the other.
        ("spill", 0, 16 * UNITS * 24 * 40, 4 * 24 * 40),
    ):
        layer = forecast(matrices(), units=UNITS, tokens=TOKENS).layers[0]
        found = (layer.strategy, layer.extra_flops, layer.extra_bytes, layer.workspace)
        assert found == (name, extra, moved, workspace)
        assert layer.flops == 3 * flops


def test_strategies_are_the_planners():
    from flashdp.planner import costs

    found = forecast(tiny_model("llama"), units=UNITS, tokens=TOKENS)
    layer = next(e for e in found.layers if e.name.endswith("q_proj"))
    module = tiny_model("llama").model.layers[0].self_attn.q_proj
    expected = costs(UNITS, TOKENS, module.in_features, module.out_features)
    assert layer.strategy == min(expected, key=expected.__getitem__)
    assert {e.strategy for e in found.layers if e.rule == "table"} == {"tokens"}
    assert found.slowdown > 1


def test_few_tokens_and_wide_matrices_are_taken_by_gram():
    wide = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    assert forecast(wide, units=8, tokens=4).layers[0].strategy == "gram"
    assert forecast(wide, units=8, tokens=8192).layers[0].strategy != "gram"


def test_memory_is_that_of_sums_and_the_largest_layer():
    found = forecast(matrices(), units=UNITS, tokens=TOKENS)
    assert found.sums == 4 * (24 * 40 + 40 * 8)
    assert found.per_sample == UNITS * found.sums
    assert found.workspace == max(e.workspace for e in found.layers)


def test_bad_input_and_models_that_cannot_be_private_are_refused():
    for wrong in ({"units": 0}, {"tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            forecast(matrices(), **{"units": 1, "tokens": 1, **wrong})
    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        forecast(nn.BatchNorm1d(3), units=1, tokens=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            forecast(matrices(), units=1, tokens=1, device="cuda")
