"""Teachers whose layers are in the host's memory."""

import sys
from pathlib import Path

import pytest
import torch
from shared_kernels.offload import UnitLayout
from slimmoe import UnsupportedModelError
from slimmoe.distillation import DistillationTrainer, Teacher

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import FAMILIES, model, tokens
from test_distillation import options, rows
from test_mtp import head_of

CPU = torch.device("cpu")


def padded(ids):
    mask = torch.ones_like(ids)
    mask[1:, ids.shape[1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def bound(module):
    """Whether the weights of a module are there."""
    return [p.untyped_storage().nbytes() >= p.nbytes for p in module.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_the_same_bits(family, dtype):
    resident = Teacher(model(family, dtype=dtype))
    streamed = Teacher(model(family, dtype=dtype), offload=True, device="cpu")
    ids = tokens(family, 3, 12)
    for inputs in ({"input_ids": ids}, padded(ids), {"input_ids": ids[:, :5]}):
        found = streamed({**inputs, "labels": ids, "cache_index": 0})
        assert torch.equal(found, resident(inputs))
        assert not found.requires_grad
    assert torch.equal(streamed.weight, resident.weight)


def test_a_layer_is_given_back_before_the_next_is_taken_over(monkeypatch):
    found, seen, write = model("qwen3_moe"), [], UnitLayout.write

    def watched(layout, *args):
        seen.append(sum(any(bound(layer)) for layer in found.model.layers))
        write(layout, *args)

    monkeypatch.setattr(UnitLayout, "write", watched)
    Teacher(found, offload=True, device="cpu")
    assert seen == [4, 3, 2, 1, 0]


def test_two_layers_are_there_at_a_time():
    # the first layer is dense, and smaller
    found = model("deepseek_v3", num_hidden_layers=6)
    layers = found.model.layers
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    streamed = Teacher(found, offload=True, device="cpu")
    ring, seen = streamed.engine.ring, []

    def look(layer, _args, _kwargs=None):
        here = [index for index, other in enumerate(layers) if any(bound(other))]
        seen.append((here, sum(ring.holds(index) for index in range(6)), all(bound(layer))))

    assert not any(any(bound(layer)) for layer in layers)
    # inside of a visit: a layer's first norm runs when its weights are bound
    for index, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(
            lambda _m, args, index=index: look(layers[index], args)
        )
    for _ in range(2):
        streamed({"input_ids": tokens("deepseek_v3")})
    assert [here for here, _, _ in seen] == [[index] for index in range(6)] * 2
    assert all(held <= 2 and whole for _, held, whole in seen)
    assert not any(any(bound(layer)) for layer in layers)
    assert ring.nbytes <= 2 * (max(sizes) + 256 * 64)
    assert sum(sizes) <= streamed.engine.store.host_nbytes
    assert all(bound(found.lm_head)) and all(bound(found.model.embed_tokens))
    # each layer once a pass, and the next one ahead
    assert set(ring.uploads.values()) <= {2, 3}


def test_it_trains_a_student_to_the_same_bits(tmp_path):
    runs = []
    for offload in (False, True):
        student, head = head_of("deepseek_v3", seed=5)
        teacher = Teacher(model("deepseek_v3", seed=9), offload=offload)
        found = DistillationTrainer(
            student, teacher, options(tmp_path / str(offload), max_steps=3), mtp=head,
            train_dataset=rows(tokens("deepseek_v3", 12, 9)),
        )  # fmt: skip
        found.train()
        runs.append(found)
    assert runs[1].teacher.engine is not None
    told = [[{k: v for k, v in t.items() if not k.startswith("train_")}
             for t in run.state.log_history] for run in runs]  # fmt: skip
    assert told[1] == told[0]
    wanted = runs[0].model.state_dict()
    for name, tensor in runs[1].model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_tied_heads():
    def made():
        found = model("qwen3_moe", tie_word_embeddings=True)
        assert found.lm_head.weight is found.model.embed_tokens.weight
        return found

    inputs = {"input_ids": tokens("qwen3_moe")}
    streamed = Teacher(made(), offload=True, device="cpu")
    assert torch.equal(streamed(inputs), Teacher(made())(inputs))
    assert streamed.weight is streamed.model.get_input_embeddings().weight


def test_folders_and_fingerprints(tmp_path):
    model("qwen3_next", seed=9).save_pretrained(tmp_path)
    resident = Teacher.from_pretrained(tmp_path)
    streamed = Teacher.from_pretrained(str(tmp_path), offload=True, device="cpu")
    assert streamed.path == resident.path == str(tmp_path)
    assert torch.equal(streamed.weight, resident.weight)
    inputs = {"input_ids": tokens("qwen3_next")}
    assert torch.equal(streamed(inputs), resident(inputs))
    assert streamed.fingerprint() == resident.fingerprint()
    assert Teacher(model("qwen3_next", seed=8)).fingerprint() != resident.fingerprint()
    half = Teacher.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.fingerprint() != resident.fingerprint()
    with torch.no_grad():
        resident.model.model.layers[3].mlp.experts.down_proj += 1e-3
    assert Teacher(resident.model).fingerprint() != streamed.fingerprint()


def test_what_is_refused(tmp_path):
    streamed = Teacher(model("qwen3_moe"), offload=True)
    assert streamed.to(CPU).to(CPU) is streamed
    with pytest.raises(ValueError, match="teacher_model: expected one that runs on meta"):
        streamed.to(torch.device("meta"))
    away = model("qwen3_moe")
    away.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="placed by a device_map"):
        Teacher(away, offload=True)
    model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="placed by a device_map"):
        Teacher.from_pretrained(
            tmp_path, offload=True, device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=tmp_path / "more",
        )  # fmt: skip
