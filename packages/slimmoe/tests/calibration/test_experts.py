"""The stand-in for experts: same outputs, and the model's own implementation afterwards."""

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import moe_families
from moe_families import FAMILIES
from slimmoe.calibration import calibrate, experts
from slimmoe.calibration.observer import Anatomy, Observer

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def observed(model, ids):
    anatomy = Anatomy(model)
    observer = Observer(anatomy)
    observer.expect(ids.numel(), None)
    with observer.watching(range(len(anatomy.layers)), start=True, end=True):
        return logits(model, ids), observer.statistics()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_same_bit_for_bit(family, implementation, dtype):
    # wide enough for the alignment that grouped products ask for
    model = moe_families.model(family, dtype=dtype, hidden_size=64, moe_intermediate_size=32)
    model.set_experts_implementation(implementation)
    ids = moe_families.tokens(model, 5, 17)
    wanted = logits(model, ids)
    found, statistics = observed(model, ids)
    assert torch.equal(found, wanted)
    assert model.get_experts_implementation()[""] == implementation
    # and what was observed is not from elsewhere
    for part in statistics["experts"].values():
        assert part.count.sum() == 5 * 17 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_the_same_in_double_precision(family):
    model = moe_families.model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")
    ids = moe_families.tokens(model, 5, 17)
    assert torch.equal(observed(model, ids)[0], logits(model, ids))


def test_grouped_experts_in_double_precision_run_one_by_one():
    model = moe_families.model("qwen3_moe", dtype=torch.float64)
    ids = moe_families.tokens(model)
    model.set_experts_implementation("eager")
    wanted = logits(model, ids)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(observed(model, ids)[0], wanted)


def test_another_implementation_is_replaced_to_rounding():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    ALL_EXPERTS_FUNCTIONS.register("another", batched_mm_experts_forward)
    model = moe_families.model("qwen3_moe")
    model.set_experts_implementation("another")
    ids = moe_families.tokens(model)
    torch.testing.assert_close(observed(model, ids)[0], logits(model, ids))
    assert model.get_experts_implementation()[""] == "another"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_implementation_is_set_back_after_an_error(implementation):
    model = moe_families.model("qwen3_moe").train()
    model.set_experts_implementation(implementation)
    before = model.get_experts_implementation()

    def fail(*_args):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, moe_families.tokens(model), progress=False)
    handle.remove()
    assert model.get_experts_implementation() == before
    assert model.training
    assert not experts._recorders
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    logits(model, moe_families.tokens(model))


def test_no_expert_sees_a_token_that_is_not_routed_to_it():
    model = moe_families.model("qwen3_moe")
    model.set_experts_implementation("eager")
    seen = 0
    for layer in model.model.layers:
        inner = layer.mlp.experts.act_fn.forward

        def count(x, inner=inner):
            nonlocal seen
            seen += len(x)
            return inner(x)

        layer.mlp.experts.act_fn.forward = count
    calibrate(model, moe_families.tokens(model, 3, 10), progress=False)
    assert seen == 4 * 30 * 2


def test_a_model_is_let_go():
    model = moe_families.model("qwen3_moe")
    calibrate(model, moe_families.tokens(model), progress=False)
    gone = [False]
    import weakref

    weakref.finalize(model, gone.__setitem__, 0, True)
    del model
    gc.collect()
    assert gone[0]
