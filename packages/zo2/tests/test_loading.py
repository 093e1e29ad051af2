"""Loading shard by shard against loading as a whole."""

import weakref

import pytest
import torch
import transformers
import zo2
from safetensors.torch import load_file, save_file
from shared_kernels.testing.models import tiny_inputs, tiny_model
from zo2 import OffloadConfig, ZOConfig
from zo2 import loading as loading_module

ZO, STREAMED = ZOConfig(seed=2), OffloadConfig(prefetch=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders: tied in one file; untied bf16 in many shards."""
    path = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(path / "tied")
    sharded = tiny_model("opt", dtype=torch.bfloat16)
    sharded.generation_config.max_new_tokens = 5
    sharded.save_pretrained(path / "sharded", max_shard_size="10kB")
    assert len(list((path / "sharded").glob("*.safetensors"))) > 3
    return path


def three_steps(engine, inputs):
    g = torch.stack([engine.step(inputs, lr=1e-2).g for _ in range(3)])
    return g, engine.state_dict()


@pytest.mark.parametrize(
    ("folder", "name", "dtype"),
    [
        ("tied", "llama", "auto"),
        ("tied", "llama", "bfloat16"),
        ("sharded", "opt", "auto"),
        ("sharded", "opt", torch.float32),
    ],
)
def test_equals_loading_as_a_whole(folders, folder, name, dtype, caplog, monkeypatch):
    auto = transformers.AutoModelForCausalLM
    whole = auto.from_pretrained(folders / folder, dtype=dtype).eval()
    expected = three_steps(zo2.prepare(whole, ZO, STREAMED, device="cpu"), tiny_inputs(name))

    def never(*args, **kwargs):
        raise AssertionError("the model was loaded as a whole")

    monkeypatch.setattr(auto, "from_pretrained", never)
    engine = zo2.from_pretrained(folders / folder, ZO, STREAMED, dtype=dtype, device="cpu")
    found = three_steps(engine, tiny_inputs(name))
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for key, value in found[1].items():
        assert value.dtype == expected[1][key].dtype
        assert torch.equal(value, expected[1][key]), key
    assert not caplog.records
    tied = engine.model.get_output_embeddings().weight is engine.model.get_input_embeddings().weight
    assert tied == (folder == "tied")
    if folder == "sharded":
        assert engine.model.generation_config.max_new_tokens == 5


def test_one_block_is_in_memory_besides_the_stores(folders, monkeypatch):
    live, most, inside = [], [], []
    getitem, build = loading_module.TensorFolder.__getitem__, loading_module.build

    def read(self, name):
        tensor = getitem(self, name).clone()
        live.append((weakref.ref(tensor), tensor.nbytes))
        return tensor

    def watch(model, zo, offload, read_unit, **kwargs):
        assert all(p.untyped_storage().nbytes() <= 8 for p in model.parameters())

        def reading(unit):
            values = read_unit(unit)
            most.append(sum(n for r, n in live if r() is not None))
            inside.append(sum(p.nbytes for p in unit.params))
            return values

        return build(model, zo, offload, reading, **kwargs)

    monkeypatch.setattr(loading_module.TensorFolder, "__getitem__", read)
    monkeypatch.setattr(loading_module, "build", watch)
    zo2.from_pretrained(folders / "tied", ZO, STREAMED, device="cpu")
    assert len(most) == 5
    assert all(alive <= own for alive, own in zip(most, inside, strict=True))
    assert max(most) < sum(inside) / 2


def test_names_that_differ_are_loaded_by_transformers_with_a_warning(folders, tmp_path, caplog):
    tensors = load_file(folders / "tied" / "model.safetensors")
    transformers.AutoConfig.from_pretrained(folders / "tied").save_pretrained(tmp_path)
    # A checkpoint of the base model alone is read directly ...
    save_file(
        {n.removeprefix("model."): t for n, t in tensors.items()},
        tmp_path / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    inputs = tiny_inputs("llama")
    expected = zo2.from_pretrained(folders / "tied", ZO, device="cpu").estimate(inputs).g
    assert torch.equal(zo2.from_pretrained(tmp_path, ZO, device="cpu").estimate(inputs).g, expected)
    assert not caplog.records
    # ... one whose tensors transformers must find by itself is not.
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = zo2.from_pretrained(tmp_path, ZO, device="cpu").estimate(inputs).g
    assert torch.equal(found, expected)
    assert "holds no safetensors" in caplog.text
    caplog.clear()
    first = next(iter(tensors))
    tensors[f"old.{first}"] = tensors.pop(first)
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    zo2.from_pretrained(tmp_path, ZO, device="cpu").close()
    assert f"no tensor named {first} (1 such)" in caplog.text


def test_other_classes_and_trainable_patterns(folders, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    engine = zo2.from_pretrained(
        tmp_path, ZO, auto_class=auto, trainable=r".*query.*", device="cpu"
    )
    g = engine.step(tiny_inputs("bert"), lr=1e-2).g
    twin = zo2.prepare(tiny_model("bert"), ZO, trainable=r".*query.*", device="cpu")
    assert torch.equal(g, twin.step(tiny_inputs("bert"), lr=1e-2).g)


@pytest.mark.parametrize(
    "kwargs", [{"device_map": "auto"}, {"quantization_config": object()}, {"load_in_4bit": True}]
)
def test_what_places_weights_itself_is_refused(folders, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        zo2.from_pretrained(folders / "tied", **kwargs)
