"""Moments of an optimizer go the way of the weights."""

import sys
from pathlib import Path

import pytest
import torch
from slimmoe import CompressionConfig, compress_model, plan, slice_optimizer_state

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import model, tokens

DEAD = [0, 3, 4, 9, 17, 20, 30, 31]


def optimizer_of(found, kind):
    if kind == "sgd":
        return torch.optim.SGD(found.parameters(), lr=0.05, momentum=0.9)
    # without it, a channel without a gradient would move
    return torch.optim.AdamW(found.parameters(), lr=0.01, amsgrad=kind == "amsgrad", eps=1e-3)


def stepped(found, optimizer, ids, live=None):
    """A step in which the gradient is of some channels only."""
    optimizer.zero_grad()
    found(ids, labels=ids, use_cache=False).loss.backward()
    if live is not None:
        live(found)
    optimizer.step()


def loaded(optimizer, found, state):
    parameters = dict(found.named_parameters())
    for name, values in state.items():
        optimizer.state[parameters[name]] = values


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd"])
def test_slicing_then_stepping_is_stepping_then_slicing(kind):
    """Where what goes has no gradient: dead channels, and layers that write nothing."""
    before = made.without_channels(model("qwen3_moe", rms_norm_eps=1e-14), DEAD)
    found = made.statistics(before)
    for site in found.norms.values():
        site.output_abs_sum[DEAD] = site.input_square_sum[DEAD] = 0
    # norms are not scaled: then a step of a norm is the same before and after
    options = CompressionConfig(hidden_size=24, rms_correction=False)
    decided = plan(before, found, options)
    optimizer = optimizer_of(before, kind)
    ids = tokens(before)
    stepped(before, optimizer, ids)

    def same(a, b):
        """Give the small model the gradients of the large one, of what it has."""
        state = {name: p.grad for name, p in a.named_parameters()}
        from slimmoe.optimizer import _Moments
        from slimmoe.rewrite import Rewriter
        from slimmoe.weights import Source

        source = Source(a)
        source.weights = _Moments(state)
        small = {out.name: out.make() for out in Rewriter(source, decided).outputs()}
        for name, p in b.named_parameters():
            p.grad = small[name].clone()

    after = compress_model(before, decided)
    small = optimizer_of(after, kind)
    loaded(small, after, slice_optimizer_state(optimizer, before, after, decided))
    optimizer.zero_grad()
    before(ids, labels=ids, use_cache=False).loss.backward()
    same(before, after)
    optimizer.step()
    small.step()
    wanted = compress_model(before, decided).state_dict()
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


def test_experts_and_layers():
    before = model("olmoe")
    optimizer = optimizer_of(before, "adamw")
    stepped(before, optimizer, tokens(before))
    found = made.statistics(before)
    options = CompressionConfig(num_experts=5, drop_layers=(1,), expert_method="merge")
    decided = plan(before, found, options)
    after = compress_model(before, decided)
    state = slice_optimizer_state(optimizer, before, after, decided)
    assert set(state) == {name for name, _ in after.named_parameters()}
    old = dict(before.named_parameters())
    name, experts = "mlp.experts.down_proj", decided.experts[2]
    moments = optimizer.state[old[f"model.layers.2.{name}"]]["exp_avg"]
    for at, (members, weights) in enumerate(zip(experts.members, experts.weights, strict=True)):
        wanted = sum(w * moments[m].double() for m, w in zip(members, weights, strict=True))
        ours = state[f"model.layers.1.{name}"]["exp_avg"][at]
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-9)
    assert all(float(values["step"]) == 1 for values in state.values())
    # it is a state that an optimizer goes on from, and not a view of the old one
    new = optimizer_of(after, "adamw")
    loaded(new, after, state)
    stepped(after, new, tokens(before))
    assert not torch.equal(moments, torch.zeros_like(moments))


@torch.no_grad()
def test_moments_are_in_the_order_of_aligned_neurons():
    """Where an expert is another with shuffled neurons, so are its moments."""
    before = model("qwen3_moe")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    optimizer = optimizer_of(before, "adamw")
    draws, moments = torch.Generator().manual_seed(2), {}
    for name, p in before.named_parameters():
        moments[name] = torch.randn(p.shape, generator=draws)
        for tensor in (p, moments[name]):
            if name.endswith("experts.gate_up_proj"):
                tensor[1] = tensor[0][torch.cat([order, order + 24])]
            elif name.endswith("experts.down_proj"):
                tensor[1] = tensor[0][:, order]
        if "experts" in name:
            # moments alone would give another order
            moments[name][1] *= -1
        optimizer.state[p] = {"exp_avg": moments[name], "step": torch.tensor(1.0)}
    found = made.statistics(before)
    for place in found.experts.values():
        place.output_sum[1], place.count[:] = place.output_sum[0], 10
        place.weighted_norm_sum[:] = 100.0
        place.weighted_norm_sum[1] = 50.0
    options = CompressionConfig(num_experts=7, expert_method="merge", alignment="hungarian")
    decided = plan(before, found, options)
    assert all(e.members[0] == [0, 1] for e in decided.experts.values())
    after = compress_model(before, decided)
    state = slice_optimizer_state(optimizer, before, after, decided)
    for layer in range(4):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            # two thirds of it, less one third of the same
            wanted = moments[name][0] / 3
            torch.testing.assert_close(state[name]["exp_avg"][0], wanted, rtol=1e-5, atol=1e-6)


def test_norms_that_are_scaled_have_smaller_gradients():
    before = model("qwen3_next")
    optimizer = optimizer_of(before, "adamw")
    stepped(before, optimizer, tokens(before))
    decided = plan(before, made.statistics(before), CompressionConfig(hidden_size=24))
    after = compress_model(before, decided)
    state = slice_optimizer_state(optimizer, before, after, decided)
    old = optimizer.state[before.model.norm.weight]
    factor = decided.norms["model.norm"]
    for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        wanted = old[kind][decided.channels] / factor**power
        torch.testing.assert_close(state["model.norm.weight"][kind], wanted)


def test_state_of_something_else():
    before = model("qwen3_moe")
    decided = plan(before, None, CompressionConfig(num_layers=2))
    after = compress_model(before, decided)
    other = model("qwen3_moe")
    optimizer = optimizer_of(other, "adamw")
    stepped(other, optimizer, tokens(other))
    with pytest.raises(ValueError, match="state of this model's parameters"):
        slice_optimizer_state(optimizer, before, after, decided)
    with pytest.raises(ValueError, match=r"compressed: expected .* of its shape|what the plan"):
        narrow = plan(other, made.statistics(other), CompressionConfig(hidden_size=16))
        slice_optimizer_state(optimizer, other, after, narrow)
    strange = torch.optim.Adagrad(before.parameters())
    stepped(before, strange, tokens(before))
    with pytest.raises(ValueError, match=r"optimizer: expected only .* got list \['sum'\]"):
        slice_optimizer_state(strange, before, after, decided)
