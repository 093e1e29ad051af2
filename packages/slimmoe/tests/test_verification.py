"""Sizes that are told, and what a compressed folder is checked for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimmoe import CompressionConfig, VerificationError, compress, plan, sizes, verify
from slimmoe.summary import compared

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import FAMILIES, model


def counted(found):
    return sum(p.numel() for p in found.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(family):
    before = model(family)
    told = sizes(before)
    assert told.parameters == sum(t.numel() for t in before.state_dict().values())
    assert told.bytes == sum(t.nbytes for t in before.state_dict().values())
    assert (told.layers, told.hidden_size, told.experts, told.neurons) == (4, 32, 8, 24)
    # of eight experts a token goes to two
    experts = sum(p.numel() for name, p in before.named_parameters()
                  if ".experts." in name)  # fmt: skip
    assert told.active_parameters == told.parameters - experts * 6 // 8 - 95 * 32
    ids = torch.arange(3, 10)[None]
    cache = before(ids, use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel()
               for layer in cache.layers if getattr(layer, "keys", None) is not None)  # fmt: skip
    assert told.kv_bytes_per_token == 4 * held // 7


def test_sizes_of_a_plan_are_those_that_come_out(tmp_path):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "before")
    options = CompressionConfig(num_experts=4, hidden_size=16, num_layers=3)
    decided = plan(before, made.statistics(before), options)
    told = compared(before, decided)
    assert told["before"]["parameters"] == counted(before)
    compress(tmp_path / "before", tmp_path / "after", plan=decided, progress=False)
    after = sizes(tmp_path / "after")
    assert told["after"] == {field: getattr(after, field) for field in told["after"]}
    assert after.parameters < counted(before) / 2


# --- verification --------------------------------------------------------------------------------


@pytest.fixture
def after(tmp_path):
    before = model("qwen3_next")
    before.save_pretrained(tmp_path / "before")
    found = made.statistics(before)
    options = CompressionConfig(num_experts=4, hidden_size=16)
    compress(tmp_path / "before", tmp_path / "after", options, statistics=found, progress=False,
             max_shard_bytes=50_000)  # fmt: skip
    return tmp_path / "after"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right(family, tmp_path):
    before = model(family)
    before.save_pretrained(tmp_path / "before")
    options = CompressionConfig(num_experts=4, drop_layers=(1,))
    compress(tmp_path / "before", tmp_path / "after", options,
             statistics=made.statistics(before), progress=False)  # fmt: skip
    told = verify(tmp_path / "after", tmp_path / "before")
    assert told["logits"] == 0
    assert told["files"] == 1
    assert told["tensors"] > 40


def test_bytes_that_changed(after):
    assert verify(after)["files"] > 1
    file = next(iter(sorted(after.glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="bytes are not those that were written"):
        verify(after)
    file.unlink()
    with pytest.raises(VerificationError, match="it is not there"):
        verify(after)


def rewritten(folder, change):
    """Tensors of one file changed, and its sum noted anew."""
    from slimmoe.streaming import checksum

    file = next(iter(sorted(folder.glob("*.safetensors"))))
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    manifest = json.loads((folder / "slimmoe.json").read_text())
    manifest["files"][file.name] = checksum(file)
    (folder / "slimmoe.json").write_text(json.dumps(manifest))


def test_tensors_that_are_not_those_of_the_class(after):
    name = "lm_head.weight"

    def wrong(state):
        state[name] = state[name][:50].contiguous()

    rewritten(after, wrong)
    with pytest.raises(VerificationError, match=r"lm_head.weight has shape \(50, 16\), not"):
        verify(after)


def test_weights_that_are_others(after, tmp_path):
    def wrong(state):
        state["lm_head.weight"][0, 0] += 1

    rewritten(after, wrong)
    verify(after)
    with pytest.raises(VerificationError, match=r"lm_head\.weight is not what compression"):
        verify(after, tmp_path / "before")


def test_what_slimmoe_did_not_write(tmp_path):
    model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"slimmoe\.json"):
        verify(tmp_path)


def test_one_call_wants_one_of_two(tmp_path):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "before")
    with pytest.raises(ValueError, match="options: expected either these or a plan"):
        compress(tmp_path / "before", tmp_path / "after")
    with pytest.raises(ValueError, match="calibration: expected something to choose by"):
        compress(tmp_path / "before", tmp_path / "after", CompressionConfig(num_experts=4))
    assert not (tmp_path / "after").exists()
