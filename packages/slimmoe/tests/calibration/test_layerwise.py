"""One layer at a time gives what the whole model gives."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import moe_families
from calibration_oracle import assert_same, exact_model
from moe_families import FAMILIES
from slimmoe.calibration import calibrate
from slimmoe.calibration.layerwise import LayerFolder


def both(folder, data, **options):
    options = {"batch_tokens": 30, "progress": False} | options
    return [calibrate(folder, data, mode=mode, **options) for mode in ("resident", "layerwise")]


def assert_equal(a, b):
    assert_same(a, b)
    for name in ("model_type", "config_sha256", "dtype", "tokens", "tokens_sha256", "batches"):
        assert getattr(a, name) == getattr(b, name)
    counted = [{name: part.tokens for name, part in s.parts()} for s in (a, b)]
    assert counted[0] == counted[1]
    assert list(counted[0]) == list(counted[1])


def shape(family):
    """Changes that make latent attention work with masks."""
    return {"num_key_value_heads": 4} if family.startswith("deepseek") else {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_resident_bit_for_bit(family, dtype, tmp_path):
    model = moe_families.model(family, dtype=dtype, **shape(family))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    # sequences of several lengths, so that there are batches with and without padding
    rows = [row[: 12 - at] for at, row in enumerate(moe_families.tokens(model, 8, 12))]
    resident, layerwise = both(tmp_path, rows, exclude=[5])
    assert_equal(layerwise, resident)
    assert resident.experts[3].count.sum() == 2 * resident.tokens


@pytest.mark.parametrize(
    ("family", "dtype", "kept"),
    [
        ("deepseek_v3", torch.bfloat16, "mlp.gate.e_score_correction_bias"),
        ("gpt_oss", torch.float16, "input_layernorm.weight"),
    ],
)
def test_what_transformers_keeps_in_single_precision_is_kept(family, dtype, kept, tmp_path):
    model = moe_families.model(family, **shape(family))
    model.save_pretrained(tmp_path)
    resident, layerwise = both(tmp_path, moe_families.tokens(model, 8, 12), dtype=dtype)
    assert_equal(layerwise, resident)
    folder = LayerFolder(tmp_path, torch.device("cpu"), dtype)
    folder.load_layer(2)
    assert folder.anatomy.layers[2].state_dict()[kept].dtype == torch.float32
    assert folder.anatomy.layers[2].state_dict()["self_attn.o_proj.weight"].dtype == dtype


def test_left_padding_and_hidden_states_on_disk(tmp_path):
    model = moe_families.model("gpt_oss")
    model.save_pretrained(tmp_path / "model")
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :7] = mask[1, :2] = 0
    data = [{"input_ids": moe_families.tokens(model, 3, 20), "attention_mask": mask}] * 2
    (tmp_path / "scratch").mkdir()
    resident, layerwise = both(tmp_path / "model", data, scratch=tmp_path / "scratch")
    assert_equal(layerwise, resident)
    assert not list((tmp_path / "scratch").iterdir())


def test_long_sequences_pass_sliding_windows_and_chunks(tmp_path):
    for family in ("gpt_oss", "qwen3_next"):
        model = moe_families.model(family)
        model.save_pretrained(tmp_path / family)
        resident, layerwise = both(tmp_path / family, moe_families.tokens(model, 1, 64 + 37))
        assert_equal(layerwise, resident)


def test_in_double_precision(tmp_path):
    model = exact_model("mixtral")
    model.save_pretrained(tmp_path)
    ids = moe_families.tokens(model)
    found = calibrate(
        tmp_path, ids, mode="layerwise", dtype=torch.float64, batch_tokens=30, progress=False
    )
    assert_equal(found, calibrate(model, ids, batch_tokens=30, progress=False))


def test_only_two_layers_are_in_memory(tmp_path, monkeypatch):
    model = moe_families.model("qwen3_moe", num_hidden_layers=6)
    model.save_pretrained(tmp_path)
    folders, most, ran = [], [], []
    load = LayerFolder.load_layer

    def watched(self, index):
        folders.append(self)
        load(self, index)

    def state(module, *_args):
        folder = folders[0]
        names = {id(layer): at for at, layer in enumerate(folder.anatomy.layers)}
        ran.append(names[id(module)])
        here = [
            at
            for at, layer in enumerate(folder.anatomy.layers)
            if not any(p.is_meta for p in layer.parameters())
        ]
        most.append(here)
        assert folder.model.lm_head.weight.is_meta

    monkeypatch.setattr(LayerFolder, "load_layer", watched)
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    forward = Qwen3MoeDecoderLayer.forward

    def spy(self, *args, **kwargs):
        state(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", spy)
    calibrate(
        tmp_path, moe_families.tokens(model, 4, 12), mode="layerwise", batch_tokens=24,
        progress=False,
    )  # fmt: skip
    # every layer once on each of two batches, in order
    assert ran == [layer for layer in range(6) for _ in range(2)]
    for layer, here in zip(ran, most, strict=True):
        assert layer in here
        assert set(here) <= {layer, layer + 1}
    assert all(p.is_meta for layer in folders[0].anatomy.layers for p in layer.parameters())
    assert threading.active_count() < 20


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_files_with_fused_experts(tmp_path):
    model = moe_families.model("qwen3_moe")
    ids = moe_families.tokens(model)
    model.save_pretrained(tmp_path)

    def fuse(tensors):
        for name in [name for name in tensors if ".mlp.experts." in name]:
            del tensors[name]
        for name, tensor in model.state_dict().items():
            if ".mlp.experts." in name:
                tensors[name] = tensor.clone()

    edit(tmp_path, fuse)
    resident, layerwise = both(tmp_path, ids)
    assert_equal(layerwise, resident)
    # weights at other places of the memory may be multiplied in another order
    assert_same(layerwise, calibrate(model, ids, batch_tokens=30, progress=False), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "new", "wrong"),
    [
        ("model.layers.2.mlp.gate.weight", None, r"no weights for mlp\.gate\.weight of model\.lay"),
        ("model.layers.2.mlp.gate.weight", "model.layers.2.mlp.gait.weight", "gait.weight is unkn"),
        ("model.norm.weight", None, r"no weights for norm\.weight of the model outside"),
        ("model.embed_tokens.weight", None, r"no weights for embed_tokens\.weight"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_or_renames_weights_is_refused(name, new, wrong, tmp_path):
    moe_families.model("qwen3_moe").save_pretrained(tmp_path)

    def change(tensors):
        tensor = tensors.pop(name)
        if new:
            tensors[new] = tensor

    edit(tmp_path, change)
    with pytest.raises(ValueError, match=wrong):
        calibrate(tmp_path, [[5, 6]], mode="layerwise", progress=False)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    moe_families.model("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj"):
        calibrate(tmp_path, [[5, 6]], mode="layerwise", progress=False)


def test_a_module_of_mtp_that_is_not_whole(tmp_path):
    model = moe_families.model("qwen3_next")
    model.save_pretrained(tmp_path)
    more = {"mtp.layers.0.mlp.gate.weight": torch.ones(2), "mtp.norm.weight": torch.ones(32)}
    edit(tmp_path, lambda tensors: tensors.update(more))
    for mode in ("resident", "layerwise"):
        with pytest.raises(ValueError, match=r"a tensor mtp\.pre_fc_norm_embedding\.weight"):
            calibrate(tmp_path, [[5, 6, 7]], mode=mode, progress=False)


def test_nan_is_reported_before_later_layers_are_read(tmp_path, monkeypatch):
    model = moe_families.model("qwen3_moe", num_hidden_layers=6)
    model.model.layers[1].self_attn.o_proj.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    read, load = [], LayerFolder.load_layer
    monkeypatch.setattr(LayerFolder, "load_layer", lambda s, i: (read.append(i), load(s, i))[1])
    with pytest.raises(FloatingPointError, match=r"^model\.layers\.1\."):
        calibrate(tmp_path, moe_families.tokens(model), mode="layerwise", progress=False)
    assert max(read) == 2


def test_quantized_weights_are_refused(tmp_path):
    moe_families.model("qwen3_moe").save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="quantized"):
        calibrate(tmp_path, [[5, 6]], mode="layerwise", progress=False)
