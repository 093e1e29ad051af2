"""Statistics of modules of multi-token prediction, as layers behind the last."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimmoe import CompressionConfig, compress, verify
from slimmoe.calibration import calibrate
from slimmoe.mtp import MTPHead
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from moe_families import model, tokens
from test_mtp import head_of, saved

FAMILIES = ("qwen3_next", "deepseek_v3")
NAMES = {
    "qwen3_next": ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm",
                   "mtp.layers.0.input_layernorm", "mtp.layers.0.post_attention_layernorm"),
    "deepseek_v3": tuple(f"model.layers.4.{n}" for n in (
        "enorm", "hnorm", "shared_head.norm", "input_layernorm", "post_attention_layernorm")),
}  # fmt: skip


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def statistics(model_, data, **options):
    return calibrate(model_, data, progress=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_what_the_module_computes(family):
    """Against what hooks of the test's own see, while the module runs by itself."""
    found, head = head_of(family, dtype=torch.float64)
    ids = tokens(found, 4, 9)
    told = statistics(found, ids, mtp=head)
    plain = statistics(found, ids)
    assert sorted(told.experts) == [*sorted(plain.experts), 4]
    assert set(told.norms) - set(plain.norms) == set(NAMES[family])
    assert sorted(told.layers) == [0, 1, 2, 3]
    for name in plain.norms:
        assert torch.equal(told.norms[name].output_abs_sum, plain.norms[name].output_abs_sum)
    module, seen = head.modules_[0], {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = args, output

        return hook

    parts = {
        "norm": module.norm, "mlp": module.layer.mlp, "experts": module.layer.mlp.experts,
        "router": module.layer.mlp.gate, "hidden": module.hidden_norm,
    }  # fmt: skip
    handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    hidden = found.get_decoder()(ids, use_cache=False).last_hidden_state
    head(hidden, ids)
    for handle in handles:
        handle.remove()
    # of 9 tokens, 8 are told the next
    rows = 4 * 8
    experts = told.experts[4]
    _, index, weights = seen["experts"][0]
    assert experts.tokens == rows
    assert experts.count.sum() == 2 * rows
    close(experts.count, torch.bincount(index.flatten(), minlength=8).double())
    wanted = torch.zeros(8, dtype=torch.float64)
    wanted.index_add_(0, index.flatten(), weights.flatten().double())
    close(experts.weight_sum, wanted)
    logits = seen["router"][1][0].double()
    close(experts.logit_gram, logits.T @ logits, rtol=1e-6)
    norm = told.norms[NAMES[family][2]]
    assert norm.tokens == rows
    close(norm.output_abs_sum, seen["norm"][1].abs().flatten(0, 1).sum(0))
    close(norm.input_square_sum, seen["norm"][0][0].square().flatten(0, 1).sum(0))
    close(told.norms[NAMES[family][1]].input_square_sum,
          hidden[:, :-1].square().flatten(0, 1).sum(0))  # fmt: skip


def test_padding_and_batches_do_not_matter():
    found, head = head_of("deepseek_v3", dtype=torch.float64)
    ids = [row[:size].tolist() for row, size in zip(tokens(found, 5, 12), (12, 7, 1, 2, 9),
                                                    strict=True)]  # fmt: skip
    one, other = (statistics(found, ids, mtp=head, batch_tokens=size) for size in (4096, 1))
    assert one.experts[4].tokens == other.experts[4].tokens == 11 + 6 + 0 + 1 + 8
    for name in ("count", "weight_sum", "output_sum", "activation_sum"):
        close(getattr(one.experts[4], name), getattr(other.experts[4], name), rtol=1e-6)
    masked = [{"input_ids": torch.tensor([ids[0]]),
               "mask": torch.tensor([[1] * 6 + [0] * 6])}]  # fmt: skip
    assert statistics(found, masked, mtp=head).experts[4].tokens == 5
    # both tokens that a row reads count, or it does not
    masked[0]["mask"] = torch.tensor([[0] * 6 + [1] * 6])
    assert statistics(found, masked, mtp=head).experts[4].tokens == 5


def test_its_experts_run_as_they_did():
    found, head = head_of("qwen3_next")
    before = head.config._experts_implementation
    ids = tokens(found, 2, 6)
    hidden = found.get_decoder()(ids).last_hidden_state
    wanted = head(hidden, ids)[0]
    statistics(found, ids, mtp=head)
    assert head.config._experts_implementation == before
    assert torch.equal(head(hidden, ids)[0], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_at_a_time_is_as_resident(family, tmp_path):
    found, head = head_of(family)
    saved(found, head, tmp_path)
    ids = tokens(found, 4, 9)
    one, other = (statistics(tmp_path, ids, mode=mode) for mode in ("resident", "layerwise"))
    assert sorted(one.experts) == sorted(other.experts)
    assert 4 in one.experts
    for (name, a), (same, b) in zip(one.parts(), other.parts(), strict=True):
        assert name == same
        for key, tensor in a.tensors().items():
            torch.testing.assert_close(tensor, b.tensors()[key], rtol=1e-5, atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    third = statistics(loaded, ids, mtp=MTPHead.from_pretrained(tmp_path, loaded))
    torch.testing.assert_close(third.experts[4].output_sum, one.experts[4].output_sum,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_from_texts_to_a_smaller_module(family, tmp_path):
    """All of it in one call, with the module chosen by its own statistics."""
    found, head = head_of(family)
    saved(found, head, tmp_path / "before")
    options = CompressionConfig(num_experts=4, hidden_size=24, importance="freq")
    decided = compress(tmp_path / "before", tmp_path / "after", options,
                       calibration=tokens(found, 6, 12), progress=False)  # fmt: skip
    assert 4 in decided.experts
    assert verify(tmp_path / "after")["mtp"] > 10
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    again = MTPHead.from_pretrained(tmp_path / "after", smaller)
    assert again.modules_[0].layer.mlp.experts.down_proj.shape[0] == 4


def test_modules_are_for_models_in_memory(tmp_path):
    found, head = head_of("qwen3_next")
    saved(found, head, tmp_path)
    with pytest.raises(ValueError, match="mtp is for a model in memory"):
        statistics(tmp_path, [[5, 6]], mtp=head)
    state = load_file(tmp_path / "model.safetensors")
    state["mtp.fc.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for mode in ("resident", "layerwise"):
        with pytest.raises(FloatingPointError, match="mtp"):
            statistics(tmp_path, [[5, 6, 7]], mode=mode)


def test_models_without_modules_have_no_such_statistics(tmp_path):
    found = model("qwen3_next")
    found.save_pretrained(tmp_path)
    assert sorted(statistics(tmp_path, [[5, 6, 7]]).experts) == [0, 1, 2, 3]
