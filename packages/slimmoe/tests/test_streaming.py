"""From folder to folder: the same as in memory, atomic, gone on with where it was stopped."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shared_kernels.checkpoint import TensorFolder
from slimmoe import streaming
from slimmoe.configuration import CompressionConfig
from slimmoe.errors import ResumeError, UnknownTensorError, UnsupportedModelError
from slimmoe.memory import compress_model
from slimmoe.planning import CompressionPlan, plan
from slimmoe.streaming import write
from slimmoe.weights import Source
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import FAMILIES, config, model, tokens


def everything(family, alignment="none"):
    """All sizes smaller at once, as far as the family can be."""
    sizes = {"hidden_size": 24, "moe_intermediate_size": 16}
    if family == "olmoe":
        sizes.pop("hidden_size")
    if "deepseek" in family:
        sizes.pop("moe_intermediate_size")
    return CompressionConfig(
        drop_layers=(2,), num_experts=4, num_experts_per_tok=1, expert_method="partial_merge",
        similarity="router_weight", alignment=alignment, **sizes,
    )  # fmt: skip


def saved(found, folder, fused=False, most="50GB"):
    """A folder of a model, its experts apart or in one tensor."""
    found.save_pretrained(folder, max_shard_size=most)
    if fused:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        state = {name: tensor.contiguous() for name, tensor in found.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder, **options):
    found, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values()), told
    return found.eval()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def halves(folder, count):
    """The same tensors in some files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(state), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name] for name in names[number::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("fused", "shards", "dtype", "alignment"), [
    (False, 1, "float32", "none"), (True, 7, "float32", "hungarian"),
    (False, 7, "bfloat16", "hungarian"), (True, 1, "bfloat16", "none"),
])  # fmt: skip
def test_streamed_is_as_in_memory(family, fused, shards, dtype, alignment, tmp_path):
    before = model(family, dtype=getattr(torch, dtype))
    folder = saved(before, tmp_path / "before", fused)
    if shards > 1:
        halves(folder, shards)
    found = made.statistics(before)
    decided = plan(folder, found, everything(family, alignment))
    assert decided.experts == plan(before, found, everything(family, alignment)).experts
    assert any(experts.merged for experts in decided.experts.values())
    target = write(folder, tmp_path / "after", decided, max_shard_bytes=30_000, progress=False)
    wanted = compress_model(AutoModelForCausalLM.from_pretrained(folder), decided)
    after = loaded(target)
    assert after.dtype == before.dtype
    assert same(after, wanted)
    ids = tokens(before)
    with torch.no_grad():
        assert torch.equal(after(ids).logits, wanted(ids).logits)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob(".after*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_out_is_a_model(family, tmp_path):
    """It generates, and can be trained."""
    before = model(family)
    folder = saved(before, tmp_path / "before")
    decided = plan(folder, made.statistics(before), everything(family))
    after = loaded(write(folder, tmp_path / "after", decided, progress=False))
    assert after.config.num_experts_per_tok == 1
    assert len(after.model.layers) == 3
    ids = tokens(before)
    assert after.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)
    after.train()
    loss = after(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for name, p in after.named_parameters() if "norm" in name)


def test_plans_are_files(tmp_path):
    before = model("qwen3_moe")
    decided = plan(before, made.statistics(before), everything("qwen3_moe"))
    decided.save(tmp_path / "plan.json")
    found = CompressionPlan.load(tmp_path / "plan.json")
    assert found == decided
    assert found.hash == decided.hash
    with pytest.raises(ValueError, match=r"plan: expected one of this model, .*_experts"):
        compress_model(model("qwen3_moe", num_experts=16), decided)


# --- stopped, and damaged ------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """A folder, a plan, and how many shards there will be."""
    before = model("qwen3_moe")
    folder = saved(before, tmp_path / "before")
    decided = plan(folder, made.statistics(before), everything("qwen3_moe"))
    whole = write(folder, tmp_path / "whole", decided, max_shard_bytes=20_000, progress=False)
    return folder, decided, whole


def stops(monkeypatch, after):
    """Let the machine go down while a shard is written."""
    plain, seen = streaming.write_safetensors, []

    def broken(path, infos, tensors):
        seen.append(path)
        if len(seen) > after:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        plain(path, infos, tensors)

    monkeypatch.setattr(streaming, "write_safetensors", broken)
    return seen


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_stopped_goes_on(begun, tmp_path, monkeypatch):
    folder, decided, whole = begun
    stops(monkeypatch, 3)
    options = {"max_shard_bytes": 20_000, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "after", decided, **options)
    assert not (tmp_path / "after").exists()
    monkeypatch.undo()
    seen = stops(monkeypatch, 1000)
    write(folder, tmp_path / "after", decided, **options)
    total = len(list(whole.glob("*.safetensors")))
    assert len(seen) == total - 3
    assert files(tmp_path / "after") == files(whole)
    assert not list(tmp_path.glob(".after*"))


def test_what_was_damaged_is_written_again(begun, tmp_path, monkeypatch):
    folder, decided, whole = begun
    stops(monkeypatch, 3)
    options = {"max_shard_bytes": 20_000, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "after", decided, **options)
    monkeypatch.undo()
    (damaged,) = (tmp_path / ".after.slimmoe").glob("model-00002-*.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    write(folder, tmp_path / "after", decided, **options)
    assert files(tmp_path / "after") == files(whole)


def test_another_plan_does_not_go_on(begun, tmp_path, monkeypatch):
    folder, decided, whole = begun
    stops(monkeypatch, 2)
    options = {"max_shard_bytes": 20_000, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "after", decided, **options)
    monkeypatch.undo()
    other = plan(folder, None, CompressionConfig(num_layers=2))
    with pytest.raises(ResumeError, match="begun with another plan"):
        write(folder, tmp_path / "after", other, **options)
    with pytest.raises(ResumeError, match="begun with other shards"):
        write(folder, tmp_path / "after", decided, max_shard_bytes=1 << 20, progress=False)
    write(folder, tmp_path / "after", decided, resume=False, **options)
    assert files(tmp_path / "after") == files(whole)


def test_another_source_does_not_go_on(begun, tmp_path, monkeypatch):
    folder, decided, _ = begun
    stops(monkeypatch, 2)
    options = {"max_shard_bytes": 20_000, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        write(folder, tmp_path / "after", decided, **options)
    monkeypatch.undo()
    # other weights in the same place
    file = folder / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] += 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="a source whose files were others"):
        write(folder, tmp_path / "after", decided, **options)


def test_what_was_compressed_is_compressed_again(begun, tmp_path):
    _, _, whole = begun
    decided = plan(whole, None, CompressionConfig(num_layers=2))
    write(whole, tmp_path / "again", decided, progress=False)
    told = json.loads((tmp_path / "again" / "slimmoe.json").read_text())
    assert told["plan_sha256"] == decided.hash
    assert "source" not in told


def test_the_manifest_tells_what_was_done(begun):
    _, decided, whole = begun
    told = json.loads((whole / "slimmoe.json").read_text())
    assert told["plan_sha256"] == decided.hash
    assert told["plan"]["options"]["num_experts"] == 4
    shards = sorted(file.name for file in whole.glob("*.safetensors"))
    assert sorted(told["files"]) == shards
    assert told["files"][shards[0]]["bytes"] == (whole / shards[0]).stat().st_size
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TensorFolder(whole))


def test_no_room(begun, tmp_path, monkeypatch):
    folder, decided, _ = begun
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="bytes of room for weights, got 1000"):
        write(folder, tmp_path / "after", decided, progress=False)
    assert not (tmp_path / "after").exists()


def test_where_it_must_not_write(begun, tmp_path):
    folder, decided, whole = begun
    with pytest.raises(ValueError, match="target: expected another folder than the source"):
        write(folder, folder, decided, progress=False)
    with pytest.raises(FileExistsError, match="is not empty"):
        write(folder, whole, decided, progress=False)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        write(folder, tmp_path / "after", decided, max_shard_bytes=0, progress=False)


# --- what goes in --------------------------------------------------------------------------------


def test_unknown_tensors_are_refused(tmp_path):
    folder = saved(model("qwen3_moe"), tmp_path / "before")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    state["model.layers.0.mlp.experts.0.gated_proj.weight"] = state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownTensorError, match=r"gated_proj.weight: the table of qwen3_moe"):
        Source(folder)


def test_layers_beyond_the_configuration_are_refused(tmp_path):
    folder = saved(model("qwen3_moe"), tmp_path / "before")
    state = load_file(folder / "model.safetensors")
    state["model.layers.4.input_layernorm.weight"] = torch.ones(32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownTensorError, match=r"layers.4.input_layernorm"):
        Source(folder)


@pytest.mark.parametrize("name", [
    "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv",
    "model.layers.0.mlp.experts.gate_up_proj_blocks",
    "model.layers.0.self_attn.q_proj.qweight",
])  # fmt: skip
def test_quantised_weights_are_refused(name, tmp_path):
    folder = saved(model("qwen3_moe"), tmp_path / "before")
    state = load_file(folder / "model.safetensors")
    state[name] = torch.ones(2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="quantised, and no quantization_config"):
        Source(folder)


def test_truncated_and_wrong_files(tmp_path):
    folder = saved(model("qwen3_moe"), tmp_path / "before")
    halves(folder, 3)
    first = folder / "model-00001-of-00003.safetensors"
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|metadata"):
        Source(folder)
    first.unlink()
    with pytest.raises(ValueError, match="which is not there"):
        Source(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        Source(folder)


def test_other_models_are_refused(tmp_path):
    dense = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"model_type: .* got 'llama'"):
        Source(AutoModelForCausalLM.from_config(dense))
    quantised = config("qwen3_moe")
    quantised.quantization_config = {"quant_method": "fp8"}
    folder = saved(model("qwen3_moe"), tmp_path / "before")
    quantised.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="not quantised, got a quantization_config"):
        Source(folder)
