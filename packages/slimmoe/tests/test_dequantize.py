"""Quantised checkpoints are read as transformers reads them, to the bit."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimmoe import CompressionConfig, UnsupportedModelError, calibrate, compress, plan, verify
from slimmoe.cli import main
from slimmoe.distillation import Teacher
from slimmoe.weights import Source, load_model
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import model, tokens
from test_mtp import head_of, saved

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
INDICES = (
    ..., 3, slice(2, 21), (slice(None), slice(5, 19)), (4, slice(1, 30)), (slice(7, 8), 9),
    (slice(None), slice(16, 32)),
)  # fmt: skip


class Quantizer:
    def __init__(self, block):
        self.quantization_config = FineGrainedFP8Config(weight_block_size=block)


def quantised(folder, block, parts=("proj",)):
    """Rewrite a folder's matrices as transformers would."""
    file = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        matrix = tensor.ndim == 2 and any(part in name for part in parts)
        state |= Fp8Quantize(Quantizer(block))._quantize_one(name, tensor) if matrix else {
            name: tensor
        }  # fmt: skip
    save_file(state, file, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    assert any(t.dtype == FP8 for t in state.values())
    return folder


@pytest.fixture
def folders(tmp_path):
    """DeepSeek-V3 with a module of MTP in FP8, and as transformers dequantises it."""
    found, head = head_of("deepseek_v3", dtype=torch.float32)
    saved(found.to(BF16), head.to(BF16), _made(tmp_path / "fp8"))
    saved(found, head, _made(tmp_path / "plain"))
    quantised(tmp_path / "fp8", (8, 8))
    state, plain = load_file(tmp_path / "fp8" / "model.safetensors"), {}
    dequantize = Fp8Dequantize(None)
    for name, tensor in state.items():
        if tensor.dtype == FP8:
            scale = state[f"{name}_scale_inv"]
            plain[name] = dequantize._dequantize_one(tensor, scale, output_dtype=BF16)
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "fp8", tmp_path / "plain"


def _made(folder):
    folder.mkdir()
    return folder


# --- FP8 in blocks -------------------------------------------------------------------------------


def test_fp8_is_read_as_transformers_does(folders):
    fp8, plain = folders
    source, wanted = Source(fp8, dequantize=True), Source(plain)
    assert list(source.weights) == list(source.matches)
    assert source.matches == wanted.matches
    assert "quantization_config" not in source.config
    count = 0
    for name in wanted.weights:
        assert source.weights.shape(name) == wanted.weights.shape(name)
        assert source.weights.dtype(name) == wanted.weights.dtype(name)
        assert torch.equal(source.weights.read(name), wanted.weights.read(name)), name
        count += "proj" in name
    assert count > 20
    told = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
    theirs = AutoModelForCausalLM.from_pretrained(fp8, dtype=BF16, quantization_config=told)
    ours = load_model(source).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("size", [128, 64])
def test_blocks_of_128_and_parts_of_them(size):
    """Sizes need not be multiples of the block, as 576 rows of DeepSeek-V3 are not."""
    from slimmoe.dequantize import Dequantized

    draws = torch.Generator().manual_seed(0)

    class Held:
        def __init__(self, tensors):
            self.tensors = tensors

        def __iter__(self):
            return iter(self.tensors)

        def shape(self, name):
            return tuple(self.tensors[name].shape)

        def dtype(self, name):
            return self.tensors[name].dtype

        def read(self, name, index=...):
            return self.tensors[name][index]

    for shape in ((576, 256), (130, 1), (128, 300), (3, 200, 40)):
        weight = torch.randn(*shape, generator=draws).to(FP8)
        *lead, rows, columns = shape
        scale = torch.rand(*lead, -(-rows // 128), -(-columns // size), generator=draws)
        found = Dequantized(Held({"w": weight, "w_scale_inv": scale}), {
            "quant_method": "fp8", "weight_block_size": [128, size],
        })  # fmt: skip
        assert list(found) == ["w"]
        whole = found.read("w")
        for place in torch.stack([torch.randint(most, (40,), generator=draws)
                                  for most in shape], 1).tolist():  # fmt: skip
            *before, i, j = place
            exact = weight[tuple(place)].float() * scale[(*before, i // 128, j // size)]
            assert whole[tuple(place)] == exact.to(BF16)
        for index in (0, slice(1, 3), (slice(None), slice(0, 1)), (slice(2), slice(None, 1))):
            assert torch.equal(found.read("w", index), whole[index])
        if len(shape) == 2 and not rows % 128 and not columns % size:
            assert torch.equal(whole, Fp8Dequantize(None)._dequantize_one(weight, scale, BF16))


@pytest.mark.parametrize("index", INDICES)
def test_parts_are_those_of_the_whole(index, folders):
    weights = Source(folders[0], dequantize=True).weights
    names = [n for n in weights if "proj" in n and min(weights.shape(n)) >= 24][:8]
    for name in names:
        assert torch.equal(weights.read(name, index), weights.read(name)[index])


@pytest.mark.parametrize("alignment", ["none", "hungarian"])
def test_compressed_as_what_was_dequantised_before(alignment, folders, tmp_path):
    fp8, plain = folders
    found = made.statistics(Source(plain))
    options = CompressionConfig(num_experts=4, hidden_size=24, drop_layers=(1,),
                                similarity="expert_weight", alignment=alignment)  # fmt: skip
    done = [
        compress(fp8, tmp_path / "a", options, statistics=found, progress=False, dequantize=True),
        compress(plain, tmp_path / "b", options, statistics=found, progress=False),
    ]
    assert done[0] == done[1]
    states = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    described = [(tmp_path / name / "config.json").read_text() for name in "ab"]
    assert described[0] == described[1]
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    # the module behind its three layers is left aside
    assert all(name.startswith("model.layers.3.") for name in told.pop("unexpected_keys"))
    assert not any(told.values()), told
    assert verify(tmp_path / "a", fp8)["logits"] == 0


@pytest.mark.parametrize("mode", ["resident", "layerwise"])
def test_calibrated_as_what_was_dequantised_before(mode, folders):
    fp8, plain = folders
    ids = tokens("deepseek_v3", 4, 9)
    wanted = calibrate(plain, ids, mode=mode, progress=False)
    found = calibrate(fp8, ids, mode=mode, progress=False, dequantize=True)
    assert found.config_sha256 == wanted.config_sha256
    assert 4 in found.experts
    told = [dict(s.parts()) for s in (found, wanted)]
    assert told[0].keys() == told[1].keys()
    for name, part in told[0].items():
        for key, tensor in part.tensors().items():
            assert torch.equal(tensor, getattr(told[1][name], key)), (name, key)


def test_on_the_command_line(folders, tmp_path, capsys):
    fp8, _ = folders
    rows = [json.dumps({"input_ids": ids}) for ids in tokens("deepseek_v3", 4, 9).tolist()]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert main(["inspect", str(fp8)]) == 1
    assert "--dequantize" in capsys.readouterr().out
    assert main(["inspect", str(fp8), "--dequantize", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sizes = ["--num-experts", "4", "--dequantize", "--json"]
    for args in (
        ["calibrate", fp8, tmp_path / "data.jsonl", "--out", tmp_path / "s", "--dequantize"],
        ["plan", fp8, "--statistics", tmp_path / "s", "--out", tmp_path / "plan.json", *sizes],
        ["compress", fp8, tmp_path / "a", "--plan", tmp_path / "plan.json", "--dequantize"],
        ["compress", fp8, tmp_path / "b", "--data", tmp_path / "data.jsonl", *sizes],
        # nothing but dequantised
        ["compress", fp8, tmp_path / "c", "--dequantize", "--json"],
    ):
        assert main([str(arg) for arg in args]) == 0
    after = json.loads(capsys.readouterr().out.splitlines()[-1])["after"]
    assert after["bytes"] == told["bytes"]
    states = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_teachers_and_stages(folders, tmp_path, capsys):
    """A source in FP8 is compressed in stages and teaches as what was dequantised before."""
    rows = [json.dumps({"input_ids": ids}) for ids in tokens("deepseek_v3", 24, 9).tolist()]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    finals = []
    for folder, flags in zip(folders, (["--dequantize"], []), strict=True):
        cache, out = tmp_path / f"{folder.name} cache", tmp_path / f"{folder.name} run"
        args = [folder, tmp_path / "data.jsonl", *flags]
        assert main([str(arg) for arg in ["cache-teacher", *args, "--out", cache]]) == 0
        stages = ["progressive", *args, "--out", out, "--tokens", 36, 36, "--num-layers", 2,
                  "--num-experts", 4, "--batch-size", 2]  # fmt: skip
        assert main([str(arg) for arg in stages]) == 0
        said = load_file(next(cache.glob("part-*.safetensors")))
        finals.append(said | load_file(out / "stage-2" / "run" / "final" / "model.safetensors"))
    assert finals[0].keys() == finals[1].keys()
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name
    with pytest.raises(ValueError, match="options: expected none"):
        Teacher.from_pretrained(folders[0], dequantize=True, dtype=BF16)


# --- MXFP4 ---------------------------------------------------------------------------------------


def packed(folder):
    """GPT-OSS with random experts in MXFP4, and what transformers makes of them."""
    found = model("gpt_oss", dtype=BF16, hidden_size=64, moe_intermediate_size=32)
    found.save_pretrained(folder)
    file, draws, wanted = folder / "model.safetensors", torch.Generator().manual_seed(3), {}
    state = load_file(file)
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = state.pop(name).shape
        blocks = torch.randint(256, (experts, outer, inner // 32, 16), generator=draws)
        scales = torch.randint(120, 132, blocks.shape[:-1], generator=draws)
        state[f"{name}_blocks"] = blocks.to(torch.uint8)
        state[f"{name}_scales"] = scales.to(torch.uint8)
        wanted[name] = convert_moe_packed_tensors(state[f"{name}_blocks"],
                                                  state[f"{name}_scales"])  # fmt: skip
    save_file(state, file, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return wanted


def test_mxfp4_is_read_as_transformers_does(tmp_path):
    wanted = packed(tmp_path / "a")
    assert len(wanted) == 8
    source = Source(tmp_path / "a", dequantize=True)
    for name, tensor in wanted.items():
        assert source.weights.shape(name) == tensor.shape
        assert source.weights.dtype(name) == BF16
        assert torch.equal(source.weights.read(name), tensor)
        for index in (*INDICES, (slice(None), slice(20, 40)), (2, slice(31, 33), slice(3, 9))):
            # eight experts
            index = 7 if index == (slice(7, 8), 9) else index
            assert torch.equal(source.weights.read(name, index), tensor[index]), index
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=BF16, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = load_model(source).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    options = CompressionConfig(num_experts=4, hidden_size=32, moe_intermediate_size=16,
                                similarity="expert_weight", alignment="hungarian")  # fmt: skip
    found = made.statistics(source)
    # what transformers saves has the names of packed tensors again
    shutil.copytree(tmp_path / "a", tmp_path / "plain")
    state = {n: t for n, t in load_file(tmp_path / "a" / "model.safetensors").items()
             if not n.endswith(("_blocks", "_scales"))}  # fmt: skip
    save_file(state | wanted, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((tmp_path / "plain" / "config.json").read_text())
    del described["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(described))
    decided = compress(tmp_path / "a", tmp_path / "b", options, statistics=found, progress=False,
                       dequantize=True)  # fmt: skip
    assert decided.experts == plan(tmp_path / "plain", found, options).experts
    compress(tmp_path / "plain", tmp_path / "c", options, statistics=found, progress=False)
    states = [load_file(tmp_path / name / "model.safetensors") for name in "bc"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert verify(tmp_path / "b", tmp_path / "a")["logits"] == 0


def test_every_code_and_scale_of_mxfp4():
    from slimmoe.dequantize import decoded_mxfp4

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16)
    wanted = convert_moe_packed_tensors(blocks, scales.contiguous())
    found = decoded_mxfp4(blocks, scales).transpose(1, 2)
    assert torch.equal(found, wanted)
    # the sign of zero, too
    assert torch.equal(found.view(torch.int16), wanted.contiguous().view(torch.int16))


# --- what is refused -----------------------------------------------------------------------------


def rewritten(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_not_dequantised(folders, tmp_path):
    fp8, plain = folders
    with pytest.raises(
        UnsupportedModelError, match=r"got a quantization_config; .*dequantize=True"
    ):
        Source(fp8)
    assert list(Source(plain, dequantize=True).weights) == list(Source(plain).weights)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    for change, match in (
        (
            lambda s: s.update({f"{name}_scale_inv": torch.ones(2, 2)}),
            rf"{name}_scale_inv: .*\(3, ",
        ),
        (lambda s: s.pop(f"{name}_scale_inv"), rf"{name}: expected .*{name}_scale_inv"),
        (lambda s: s.update({name: s[name].to(BF16)}), rf"{name}: expected float8_e4m3fn"),
        (lambda s: s.pop(name), rf"{name}_scale_inv: .*{name}, which is not there"),
    ):
        before = (fp8 / "model.safetensors").read_bytes()
        rewritten(fp8, change)
        with pytest.raises(UnsupportedModelError, match=match):
            Source(fp8, dequantize=True)
        (fp8 / "model.safetensors").write_bytes(before)
    described = json.loads((fp8 / "config.json").read_text())
    for changes, match in (
        ({"quant_method": "gptq"}, "quant_method: expected fp8 or mxfp4, got str 'gptq'"),
        ({"weight_block_size": None}, "weight_block_size: expected two sizes"),
    ):
        other = described | {"quantization_config": described["quantization_config"] | changes}
        (fp8 / "config.json").write_text(json.dumps(other))
        with pytest.raises(UnsupportedModelError, match=match):
            Source(fp8, dequantize=True)


def test_broken_mxfp4(tmp_path):
    packed(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    for change, match in (
        (lambda s: s.pop(f"{name}_scales"), rf"{name}_blocks: .*{name}_scales"),
        (lambda s: s.update({f"{name}_scales": s[f"{name}_scales"][:, 1:].contiguous()}),
         rf"{name}_scales: expected"),
    ):  # fmt: skip
        before = (tmp_path / "model.safetensors").read_bytes()
        rewritten(tmp_path, change)
        with pytest.raises(UnsupportedModelError, match=match):
            Source(tmp_path, dequantize=True)
        (tmp_path / "model.safetensors").write_bytes(before)
