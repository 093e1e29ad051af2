"""Merging, weighting and saving of statistics."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import moe_families
from calibration_oracle import assert_same, brute_force, exact_model
from slimmoe.calibration import CalibrationStatistics, calibrate


@pytest.fixture(scope="module")
def model():
    return exact_model("qwen3_moe")


def run(model, ids, **options):
    return calibrate(model, ids, progress=False, **options)


def test_a_sum_is_one_calibration_of_both(model):
    ids = moe_families.tokens(model, 7, 11)
    whole = run(model, ids)
    added = run(model, ids[5:]) + run(model, ids[:5])
    assert_same(added, whole, rtol=1e-12)
    assert dataclasses.replace(added, batches=1).tokens_sha256 == whole.tokens_sha256
    assert (added.tokens, added.sequences, added.batches) == (77, 7, 2)
    counted = [{name: part.tokens for name, part in s.parts()} for s in (added, whole)]
    assert counted[0] == counted[1]


def test_domains_are_weighted(model):
    ids = moe_families.tokens(model, 3, 11)
    twice = run(model, ids).scaled(2.0)
    assert_same(twice, run(model, torch.cat([ids, ids])), rtol=1e-12)
    assert twice.layers[0].tokens == 66
    # what was run stays what it was
    assert twice.tokens == 33
    a, b = run(model, ids[:1]), run(model, ids[1:])
    mixed = a.scaled(0.75) + b.scaled(0.25)
    wanted = 0.75 * a.experts[1].weight_sum + 0.25 * b.experts[1].weight_sum
    assert torch.equal(mixed.experts[1].weight_sum, wanted)
    assert mixed.experts[1].tokens == 0.75 * 11 + 0.25 * 22
    largest = torch.maximum(a.experts[1].norm_max, b.experts[1].norm_max)
    assert torch.equal(mixed.experts[1].norm_max, largest)
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive finite"):
            a.scaled(weight)


def test_means_are_over_tokens_not_over_batches(model):
    """Batches of 1, 9 and 3 tokens: a mean of their means would be another."""
    rows = [row[:n] for row, n in zip(moe_families.tokens(model, 3, 9), (1, 9, 3), strict=True)]
    found = run(model, rows, batch_tokens=1)
    part = brute_force("qwen3_moe", model, rows)["experts.0"]
    mean = found.experts[0].share_sum / found.experts[0].tokens
    torch.testing.assert_close(mean, part["share_sum"] / 13, rtol=1e-12, atol=0)


def test_another_model_is_refused(model):
    a = run(model, [[5, 6]])
    with pytest.raises(ValueError, match="model_type: expected 'qwen3_moe'"):
        a + run(moe_families.model("olmoe"), [[5, 6]])
    with pytest.raises(ValueError, match="config_sha256"):
        a + run(exact_model("qwen3_moe", num_experts=16), [[5, 6]])
    with pytest.raises(ValueError, match="dtype: expected 'float64' in both"):
        a + run(moe_families.model("qwen3_moe"), [[5, 6]])
    fewer = dataclasses.replace(a, layers={0: a.layers[0]})
    with pytest.raises(ValueError, match="other layers or sizes"):
        a + fewer


def test_the_hash_is_of_the_tokens(model):
    hashes = [run(model, data).tokens_sha256 for data in ([[5, 6], [7]], [[7], [5, 6]])]
    assert hashes[0] == hashes[1]
    for other in ([[5, 6, 7]], [[5, 6], [8]], [[5, 6], [7], [7]]):
        assert run(model, other).tokens_sha256 != hashes[0]


def test_coverage(model):
    router = model.model.layers[1].mlp.gate.weight
    before = router.detach().clone()
    try:
        # experts 2 and 5 have the logit 0, and the others have higher or lower ones
        router.data[[2, 5]] = 0
        others = [0, 1, 3, 4, 6, 7]
        router.data[others] = torch.cat([before[others[:3]], -before[others[:3]]])
        found = run(model, moe_families.tokens(model, 4, 12)).coverage()
    finally:
        router.data.copy_(before)
    assert found[1].never_selected == (2, 5)
    assert (found[1].least_count, found[1].mean_count) == (0, 12)
    assert found[0].never_selected == ()
    assert found[0].least_count > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_saved_and_read_bit_for_bit(family, tmp_path):
    made = moe_families.model(family)
    saved = run(made, moe_families.tokens(made)).scaled(0.3)
    saved.save_pretrained(tmp_path / "a")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "statistics.json",
        "statistics.safetensors",
    ]
    read = CalibrationStatistics.from_pretrained(tmp_path / "a")
    assert_same(read, saved)
    for field in dataclasses.fields(saved):
        if field.name not in ("experts", "norms", "layers", "embedding"):
            assert getattr(read, field.name) == getattr(saved, field.name)
    assert [(n, p.tokens) for n, p in read.parts()] == [(n, p.tokens) for n, p in saved.parts()]
    read.save_pretrained(tmp_path / "b")
    for name in ("statistics.json", "statistics.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(FileExistsError):
        read.save_pretrained(tmp_path / "b")
    assert_same(read + saved, saved + read)


def test_damaged_files_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"statistics\.json is not there"):
        CalibrationStatistics.from_pretrained(tmp_path)
    folder = tmp_path / "s"
    run(model, [[5, 6]]).save_pretrained(folder)
    json_path, path = folder / "statistics.json", folder / "statistics.safetensors"
    record, tensors = json.loads(json_path.read_text()), load_file(path)

    def refused(match, **changes):
        json_path.write_text(json.dumps(record | changes))
        with pytest.raises(ValueError, match=match):
            CalibrationStatistics.from_pretrained(folder)
        json_path.write_text(json.dumps(record))

    refused("does not describe", format="else")
    refused("of version 99", version=99)
    refused("unknown kind 'other.1'", counted=record["counted"] | {"other.1": 3})
    refused("lacks experts.9.count", counted=record["counted"] | {"experts.9": 3})
    fewer = {k: v for k, v in record["counted"].items() if k != "layers.2"}
    refused("do not agree on 'layers.2.output_sum'", counted=fewer)
    json_path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        CalibrationStatistics.from_pretrained(folder)
    json_path.write_text(json.dumps({k: v for k, v in record.items() if k != "dtype"}))
    with pytest.raises(ValueError, match="lacks 'dtype'"):
        CalibrationStatistics.from_pretrained(folder)
    json_path.write_text(json.dumps(record))

    def damaged(match, **changes):
        changed = tensors | changes
        save_file({k: v for k, v in changed.items() if v is not None}, path)
        with pytest.raises(ValueError, match=match):
            CalibrationStatistics.from_pretrained(folder)

    name = "experts.1.output_sum"
    damaged("lacks experts.1.output_sum", **{name: None})
    damaged("another dtype or shape", **{name: tensors[name].float()})
    damaged("another dtype or shape", **{name: tensors[name][:3].clone()})
    damaged("do not agree on 'more'", more=torch.zeros(1))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"statistics\.safetensors is not there"):
        CalibrationStatistics.from_pretrained(folder)
