"""What must not change a model does not: experts, channels and layers that do not matter."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from slimmoe.configuration import CompressionConfig
from slimmoe.memory import compress_model
from slimmoe.planning import plan
from slimmoe.weights import Source

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import FAMILIES, model, tokens

WIDE = [family for family in FAMILIES if family != "olmoe"]
KEEP = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


def exact(family, **changes):
    """A model in float64 whose experts run one after the other."""
    found = model(family, dtype=torch.float64, **changes)
    found.set_experts_implementation("eager")
    return found


@torch.no_grad()
def logits(found, ids):
    return found(ids, use_cache=False).logits.double()


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


def sizes(found):
    return {name: tuple(tensor.shape) for name, tensor in found.state_dict().items()}


# --- nothing asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_sizes_are_the_same_bits(family):
    before = model(family)
    config = before.config
    count = Source(before).family.count(config.to_dict())
    options = CompressionConfig(
        num_layers=4, hidden_size=32, num_experts=count, expert_method="partial_merge"
    )
    after = compress_model(before, plan(before, made.statistics(before), options))
    assert sizes(after) == sizes(before)
    assert all(torch.equal(a, b) for a, b in zip(
        after.state_dict().values(), before.state_dict().values(), strict=True
    ))  # fmt: skip
    assert torch.equal(logits(after, tokens(before)), logits(before, tokens(before)))


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_never_selected_go(family):
    gone = [1, 5] if "deepseek" in family else [1, 2, 5]
    before = made.never_selected(exact(family), gone)
    found = made.statistics(before)
    for place in found.experts.values():
        place.count[gone] = 0
    options = CompressionConfig(num_experts=8 - len(gone), expert_method="prune", importance="freq")
    decided = plan(before, found, options)
    kept = [expert for expert in range(8) if expert not in gone]
    assert all(experts.kept == kept for experts in decided.experts.values())
    after = compress_model(before, decided)
    ids = tokens(before)
    error = apart(logits(after, ids), logits(before, ids))
    lossless = Source(before).family.renormalises(before.config.to_dict())
    told = [place.get("dropped_mass") for place in decided.report.values()]
    assert all(place["dropped_selections"] == 0 for place in decided.report.values())
    if lossless:
        assert error < 1e-6
        assert told == [None] * len(told)
    else:
        # nothing of their probability is left here; how much was is told
        assert error < 1e-6
        assert all(0 < mass < 1 for mass in told)
    # and which experts those are matters
    other = CompressionConfig(num_experts=8 - len(gone), expert_method="prune")
    for place in found.experts.values():
        place.weighted_norm_sum[gone] = 1e6
        place.count[gone] = 1
    worse = compress_model(before, plan(before, found, other))
    assert apart(logits(worse, ids), logits(before, ids)) > 1e-2


def test_without_renormalisation_a_dropped_experts_mass_is_missed():
    before = exact("olmoe")
    ids = tokens(before)
    with torch.no_grad():
        for name, tensor in before.state_dict().items():
            if "gate.weight" in name:
                # selected less than others, with some probability
                tensor[5:] *= 0
                tensor[:5] += 0.5
    found = made.statistics(before)
    for place in found.experts.values():
        place.count[5:] = 0
    options = CompressionConfig(num_experts=5, expert_method="prune", importance="freq")
    after = compress_model(before, plan(before, found, options))
    assert apart(logits(after, ids), logits(before, ids)) > 1e-4


@torch.no_grad()
def test_duplicates_are_merged_into_what_they_are():
    for family in KEEP:
        before = exact(family)
        for name, tensor in before.state_dict().items():
            if "experts" in name and "shared" not in name:
                tensor[1], tensor[6] = tensor[0], tensor[4]
        found = made.statistics(before)
        for place in found.experts.values():
            # 1 is most like 0, and 6 like 4
            place.output_sum[1], place.output_sum[6] = place.output_sum[0], place.output_sum[4]
            place.count[[0, 1, 4, 6]] = 100
            place.weighted_norm_sum[[1, 6]] = 1e-3
        options = CompressionConfig(num_experts=6, expert_method="merge")
        decided = plan(before, found, options)
        assert all(e.members[0] == [0, 1] and e.members[3] == [4, 6]
                   for e in decided.experts.values())  # fmt: skip
        after = compress_model(before, decided).state_dict()
        for name, tensor in before.state_dict().items():
            if "experts" in name and "shared" not in name:
                wanted = tensor[[0, 2, 3, 4, 5, 7]]
                torch.testing.assert_close(after[name], wanted, rtol=1e-12, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", KEEP)
def test_neurons_in_another_order_are_found(family):
    """A duplicate whose neurons are shuffled merges into the same function, once aligned."""
    before = exact(family)
    state, order = (
        before.state_dict(),
        torch.randperm(24, generator=torch.Generator().manual_seed(1)),
    )
    pairs = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    for name, tensor in state.items():
        if "experts" not in name or "shared" in name:
            continue
        if family == "gpt_oss":
            index = pairs if "gate_up" in name else order
            if "gate_up" in name:
                tensor[1] = tensor[0][..., index]
            elif name.endswith("bias"):
                tensor[1] = tensor[0]
            else:
                tensor[1] = tensor[0][index]
        elif "gate_up" in name:
            tensor[1] = tensor[0][torch.cat([order, order + 24])]
        else:
            tensor[1] = tensor[0][:, order]
    found = made.statistics(before)
    for place in found.experts.values():
        place.output_sum[1], place.output_sum[5] = place.output_sum[0], place.output_sum[4]
        place.weighted_norm_sum[:] = 100.0
        # one of each group of DeepSeek's goes
        place.weighted_norm_sum[[1, 5]], place.count[:] = 50.0, 10
    errors = {}
    for alignment in ("hungarian", "none"):
        options = CompressionConfig(num_experts=6, expert_method="merge", alignment=alignment)
        decided = plan(before, found, options)
        assert all(e.members[0] == [0, 1] for e in decided.experts.values())
        after = compress_model(before, decided).state_dict()
        errors[alignment] = max(
            apart(after[name][0], state[name][0])
            for name in state
            if "experts" in name and "shared" not in name and not name.endswith("bias")
        )
    assert errors["hungarian"] < 1e-12
    assert errors["none"] > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_preserving_all_is_pruning(family):
    before = model(family)
    found = made.statistics(before)
    one, other = (
        plan(before, found, CompressionConfig(num_experts=4, **options))
        for options in ({"expert_method": "prune"},
                        {"expert_method": "partial_merge", "preserve_ratio": 1.0})
    )  # fmt: skip
    assert one.experts == other.experts
    assert not any(experts.merged for experts in one.experts.values())
    ids = tokens(before)
    assert torch.equal(*(logits(compress_model(before, p), ids) for p in (one, other)))


# --- channels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WIDE)
def test_channels_that_are_not_used_go(family):
    dead = [0, 3, 4, 9, 17, 20, 30, 31]
    # the epsilon of a norm is added to a mean over other channels afterwards; norms of transformers
    # are in float32 whatever the model is
    before = made.without_channels(exact(family, rms_norm_eps=1e-14), dead)
    kept = [channel for channel in range(32) if channel not in dead]
    found = made.statistics(before)
    for site in found.norms.values():
        site.output_abs_sum[dead] = site.input_square_sum[dead] = 0
    ids = tokens(before)
    errors = {}
    for corrected in (True, False):
        options = CompressionConfig(hidden_size=24, rms_correction=corrected)
        decided = plan(before, found, options)
        assert decided.channels == kept
        after = compress_model(before, decided)
        assert after.config.hidden_size == 24
        errors[corrected] = apart(logits(after, ids), logits(before, ids))
    assert errors[True] < 5e-6
    assert errors[False] > 0.02


def test_a_model_whose_sizes_are_all_the_same():
    """An axis is told by its name: here nothing else tells it."""
    from moe_families import SAME

    dead = [1, 2, 5, 7, 8, 11, 13, 14]
    before = made.without_channels(exact("qwen3_moe", rms_norm_eps=1e-14, **SAME), dead)
    found = made.statistics(before)
    for site in found.norms.values():
        site.output_abs_sum[dead] = site.input_square_sum[dead] = 0
    decided = plan(before, found, CompressionConfig(hidden_size=8))
    after = compress_model(before, decided)
    ids = torch.randint(3, 16, (3, 9), generator=torch.Generator().manual_seed(0))
    assert apart(logits(after, ids), logits(before, ids)) < 5e-6
    assert sizes(after)["model.layers.0.self_attn.q_proj.weight"] == (16, 8)
    assert sizes(after)["model.layers.0.self_attn.o_proj.weight"] == (8, 16)
    assert sizes(after)["model.layers.0.mlp.experts.gate_up_proj"] == (16, 32, 8)


def test_tied_embeddings_stay_tied():
    before = model("qwen3_moe", tie_word_embeddings=True)
    decided = plan(before, made.statistics(before), CompressionConfig(hidden_size=16))
    after = compress_model(before, decided)
    assert after.lm_head.weight.data_ptr() == after.model.embed_tokens.weight.data_ptr()
    wanted = before.model.embed_tokens.weight[:, decided.channels]
    assert torch.equal(after.model.embed_tokens.weight, wanted)
    # what is tied is there once
    assert "lm_head.weight" not in Source(before).matches


def test_a_model_runs_as_it_did():
    before = model("qwen3_moe").train()
    before.set_attn_implementation("eager")
    before.set_experts_implementation("batched_mm")
    after = compress_model(before, plan(before, None, CompressionConfig(num_layers=2)))
    assert after.training
    assert after.config._attn_implementation == "eager"
    assert after.config._experts_implementation == "batched_mm"


# --- neurons and layers --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in FAMILIES if "deepseek" not in f])
def test_neurons_that_write_nothing_go(family):
    before = exact(family)
    gone = torch.tensor([0, 3, 7, 8, 11, 12, 20, 23])
    for name, tensor in before.state_dict().items():
        if "experts.down_proj" in name and not name.endswith("bias"):
            tensor.index_fill_(1 if family == "gpt_oss" else 2, gone, 0)
    found = made.statistics(before)
    for place in found.experts.values():
        place.activation_sum[:, gone] = 0
    decided = plan(before, found, CompressionConfig(moe_intermediate_size=16))
    after = compress_model(before, decided)
    ids = tokens(before)
    assert apart(logits(after, ids), logits(before, ids)) < 1e-12
    assert all(len(e) == 16 for place in decided.neurons.values() for e in place)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_write_nothing_go(family):
    before = made.without_layers(exact(family), [1, 2])
    if family == "gpt_oss":
        with torch.no_grad():
            for layer in before.model.layers:
                layer.self_attn.o_proj.bias.zero_()
                layer.mlp.experts.down_proj_bias.zero_()
    after = compress_model(before, plan(before, None, CompressionConfig(drop_layers=(1, 2))))
    ids = tokens(before)
    assert len(after.model.layers) == 2
    assert apart(logits(after, ids), logits(before, ids)) < 1e-12


def test_the_last_layers_go_or_those_that_change_least():
    before = model("qwen3_moe")
    found = made.statistics(before)
    assert plan(before, None, CompressionConfig(num_layers=3)).layers == [0, 1, 2]
    # layer 1 gives what layer 0 gave, but for its size
    found.layers[1].output_sum[:] = 3 * found.layers[0].output_sum
    options = CompressionConfig(num_layers=2, depth_method="similarity")
    assert plan(before, found, options).layers == [0, 3]
    # the last layer is most like the one before it, but two go that follow one another
    found.layers[1].output_sum[:] = -found.layers[0].output_sum
    found.layers[2].output_sum[:] = found.layers[1].output_sum + found.embedding.output_sum
    found.layers[3].output_sum[:] = 2 * found.layers[2].output_sum
    kept = plan(before, found, options).layers
    sums = [found.embedding, *found.layers.values()]
    alike = [float(torch.cosine_similarity(a.output_sum, b.output_sum, dim=0))
             for a, b in pairwise(sums)]  # fmt: skip
    assert max(alike) == alike[3]
    first = max(range(3), key=lambda layer: alike[layer])
    assert kept == [layer for layer in range(4) if layer not in (first, first + 1)]
