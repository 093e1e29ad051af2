"""Statistics against brute force, and what must not change them."""

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import moe_families
from calibration_oracle import assert_same, brute_force, exact_model
from moe_families import FAMILIES
from slimmoe.calibration import calibrate
from slimmoe.calibration.observer import Anatomy, Observer

#: These compute their routers' logits in float32 whatever the model's dtype, and products of other
#: shapes round otherwise.
SINGLE = {"deepseek_v2": 1e-6, "deepseek_v3": 1e-6}


def run(model, data, **options):
    return calibrate(model, data, progress=False, **{"batch_tokens": 1 << 20} | options)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force(family):
    model = exact_model(family)
    ids = moe_families.tokens(model, 4, 13)
    found = run(model, ids, batch_tokens=13)
    assert found.batches == 4
    assert_same(found, brute_force(family, model, ids), rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force_where_all_sizes_are_equal(family):
    model = exact_model(family, **moe_families.SAME)
    ids = moe_families.tokens(model, 2, 9)
    assert_same(run(model, ids, batch_tokens=9), brute_force(family, model, ids), rtol=1e-12)


def test_equals_brute_force_with_unnormalized_sigmoid_weights():
    model = exact_model("deepseek_v3")
    model.config.norm_topk_prob = False
    for layer in model.model.layers[1:]:
        layer.mlp.gate.norm_topk_prob = False
    ids = moe_families.tokens(model, 2, 9)
    found = run(model, ids, batch_tokens=9)
    assert_same(found, brute_force("deepseek_v3", model, ids), rtol=1e-12)
    part = found.experts[2]
    assert not torch.allclose(part.share_sum, part.weight_sum)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_k_experts_and_shares_of_one(family):
    model = exact_model(family)
    found = run(model, moe_families.tokens(model, 3, 12))
    dense = 1 if family.startswith("deepseek") else 0
    assert list(found.experts) == list(range(dense, 4))
    for part in found.experts.values():
        assert part.tokens == 36
        assert part.count.sum() == 36 * model.config.num_experts_per_tok
        torch.testing.assert_close(part.share_sum.sum().item(), 36.0)
        torch.testing.assert_close(part.probability_sum.sum().item(), 36.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_do_not_matter(family):
    model = exact_model(family)
    ids = moe_families.tokens(model, 64, 6)
    whole = run(model, ids)
    for tokens, batches in ((6, 64), (6 * 27, 3)):
        split = run(model, ids, batch_tokens=tokens)
        assert split.batches == batches
        assert split.tokens_sha256 == whole.tokens_sha256
        assert_same(split, whole, rtol=SINGLE.get(family, 1e-12))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(family, side):
    model = exact_model(family)
    rows = list(moe_families.tokens(model, 4, 12))
    rows = [row[: 12 - 3 * at] for at, row in enumerate(rows)]
    ids, mask = torch.zeros(4, 15, dtype=torch.int64), torch.zeros(4, 15, dtype=torch.int64)
    for at, row in enumerate(rows):
        place = slice(15 - len(row), 15) if side == "left" else slice(len(row))
        ids[at, place], mask[at, place] = row, 1
    padded = run(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = run(model, rows, batch_tokens=1)
    assert (padded.tokens, padded.sequences) == (alone.tokens, alone.sequences) == (30, 4)
    assert padded.tokens_sha256 == alone.tokens_sha256
    bound = SINGLE.get(family, 1e-12)
    if family == "qwen3_next" and side == "left":
        # linear attention is computed in float32, in chunks that begin elsewhere
        bound = 1e-5
    assert_same(padded, alone, rtol=bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_padding_does_not_matter(family):
    model = exact_model(family)
    rows = [row[: 12 - 3 * at].tolist() for at, row in enumerate(moe_families.tokens(model, 4, 12))]
    found = run(model, rows)
    assert (found.batches, found.tokens) == (1, 30)
    assert_same(found, run(model, rows, batch_tokens=1), rtol=SINGLE.get(family, 1e-12))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_tokens_that_do_not_count_are_run(family):
    model = exact_model(family)
    ids = moe_families.tokens(model, 3, 10)
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.6
    found = run(model, [{"input_ids": ids[i : i + 1], "mask": mask[i : i + 1]} for i in range(3)])
    assert_same(found, brute_force(family, model, ids, mask), rtol=1e-12)
    assert found.tokens == found.layers[2].tokens == mask.sum()


def test_excluded_tokens_are_run_and_do_not_count():
    model = exact_model("qwen3_moe")
    ids = moe_families.tokens(model, 3, 10)
    ids[:, 0], ids[1, 4], ids[2] = 1, 2, 1
    found = run(model, ids, exclude=[1, 2], batch_tokens=10)
    assert found.tokens == 10 * 2 - 3
    keep = (ids != 1) & (ids != 2)
    assert_same(found, brute_force("qwen3_moe", model, ids, keep), rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_single_precision_is_close_under_every_implementation(family, implementation):
    model = moe_families.model(family)
    model.set_experts_implementation(implementation)
    ids = moe_families.tokens(model, 4, 13)
    # rounding may route a token otherwise; it does not on these
    wanted = run(exact_model(family), ids)
    assert_same(run(model, ids), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "place", ["self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.gate.weight"]
)
def test_nan_is_reported_with_its_layer(place):
    model = moe_families.model("qwen3_moe")
    model.get_parameter(f"model.layers.2.{place}").data[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^model\.layers\.2\b.*not finite"):
        run(model, moe_families.tokens(model))


def test_nan_ends_the_run_at_once():
    model = moe_families.model("qwen3_moe")
    model.model.layers[1].self_attn.o_proj.weight.data[0] = float("nan")
    ran = []
    handle = model.model.norm.register_forward_hook(lambda *_: ran.append(1))
    match = r"^model\.layers\.1\.post_attention_layernorm: output_abs_sum is not finite"
    with pytest.raises(FloatingPointError, match=match):
        run(model, moe_families.tokens(model, 4, 12), batch_tokens=12)
    handle.remove()
    assert len(ran) == 1


def test_a_model_without_a_list_of_layers_is_refused():
    model = moe_families.model("qwen3_moe")
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="no list of 3 decoder layers"):
        Anatomy(model)


def test_experts_with_two_routers_are_refused():
    model = moe_families.model("qwen3_moe")
    block = model.model.layers[1].mlp
    block.other = torch.nn.Linear(32, 8, bias=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1: expected gated experts beside one"):
        Anatomy(model)


def test_experts_that_run_past_the_registry_are_an_error():
    model = moe_families.model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.forward = lambda hidden, index, weights: hidden
    with pytest.raises(RuntimeError, match=r"model\.layers\.1: its experts ran past"):
        run(model, moe_families.tokens(model))


INTERPRETED = """
import sys
sys.path[:0] = sys.argv[1:]
import moe_families, torch
from calibration_oracle import assert_same
from shared_kernels._library import force_impl
from slimmoe.calibration import calibrate

for family, dtype in (("qwen3_moe", torch.float64), ("gpt_oss", torch.bfloat16)):
    model = moe_families.model(family, dtype=dtype, num_hidden_layers=2)
    ids = moe_families.tokens(model, 3, 7)
    mask = torch.arange(21).view(3, 7) % 4 > 0
    for data in (ids, [{"input_ids": ids, "mask": mask}]):
        found = []
        for impl in ("triton", "reference"):
            with force_impl(impl):
                found.append(calibrate(model, data, progress=False))
        assert_same(*found, rtol=1e-12 if dtype == torch.float64 else 1e-6)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernels_measure_the_same():
    folders = [Path(__file__).parent, Path(__file__).parents[1]]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, *folders], env=env, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def on_a_gpu(family="qwen3_moe", **changes):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # wide enough for the alignment that grouped products ask for
    changes = {"hidden_size": 64, "moe_intermediate_size": 32} | changes
    model = moe_families.model(family, **changes)
    model.set_experts_implementation("eager")
    return model, copy.deepcopy(model).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_measures_what_a_cpu_does(family):
    model, other = on_a_gpu(family, dtype=torch.float64)
    ids = moe_families.tokens(model, 6, 17)
    mask = torch.arange(102).view(6, 17) % 5 > 0
    for data in (ids, [{"input_ids": ids, "mask": mask}]):
        wanted, found = run(model, data), run(other, data)
        # norms are computed in float32 whatever the model's dtype
        assert_same(found, wanted, rtol=1e-4)
        assert_same(run(other, data), found)


def waits(call):
    """How often a call waits for the device, and what it returns."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen), found


@pytest.mark.gpu
def test_hooks_wait_for_nothing():
    _, model = on_a_gpu(dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    ids = moe_families.tokens(model, 6, 17).cuda()
    keep = (torch.arange(102).view(6, 17) % 5 > 0).cuda()
    watched = Observer(Anatomy(model))

    @torch.no_grad()
    def forward():
        return model.model(ids, use_cache=False).last_hidden_state

    least, wanted = waits(forward)
    for counted in (None, keep):
        watched.expect(102 if counted is None else int(keep.sum()), counted)
        with watched.watching(range(4), start=True, end=True):
            count, found = waits(forward)
        assert count <= least
        assert torch.equal(found, wanted)
    # each ran twice, and a token has two experts
    statistics = watched.statistics()
    assert statistics["experts"][0].count.sum() == 2 * 2 * (102 + int(keep.sum()))


def test_sums_hold_no_memory_of_others():
    model = exact_model("qwen3_moe")
    found = run(model, moe_families.tokens(model, 3, 12))
    for _, part in found.parts():
        for tensor in part.tensors().values():
            assert tensor.is_contiguous()
            assert tensor.device.type == "cpu"


def test_a_model_without_experts():
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=40,
    )  # fmt: skip
    found = run(transformers.AutoModelForCausalLM.from_config(config), [[5, 6, 7]])
    assert not found.experts
    assert len(found.norms) == 5
