"""What a plan warns of, and what a compressed model says of itself."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from slimmoe import CompressionConfig, UnsupportedModelError, calibrate, compress, plan
from slimmoe._version import __version__
from slimmoe.cli import main
from slimmoe.planning import CompressionPlan

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import model, tokens
from test_evaluation import tokenizer

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"


def warned(before, statistics=None, least=0, **options):
    return plan(before, statistics, CompressionConfig(**options), minimum_tokens=least).warnings


# --- patterns of layers --------------------------------------------------------------------------


@pytest.mark.parametrize(("kinds", "drop", "broken"), [
    # whole patterns at the end, in the middle, and one made of two halves
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (8, 9, 10, 11), False),
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (4, 5, 6, 7), False),
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (2, 3, 4, 5), False),
    # the last pattern is cut; one of its layers is gone; two full ones one after the other
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (10, 11), True),
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (5,), True),
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (4, 5, 6), True),
    # as many as two patterns, and none
    ([LINEAR, LINEAR, LINEAR, FULL] * 3, (0, 1, 4, 5), True),
    # a source whose own last pattern is not whole may lose that
    ([LINEAR, LINEAR, LINEAR, FULL] * 2 + [LINEAR, LINEAR], (8, 9), False),
    ([LINEAR, LINEAR, LINEAR, FULL] * 2 + [LINEAR, LINEAR], (0, 1, 2, 3), False),
    ([LINEAR, LINEAR, LINEAR, FULL] * 2 + [LINEAR, LINEAR], (9,), True),
    # no pattern
    ([FULL] * 6, (5,), False), ([LINEAR, FULL, FULL, LINEAR, LINEAR, FULL], (2,), False),
])  # fmt: skip
def test_a_pattern_that_is_cut(kinds, drop, broken, caplog):
    before = model("qwen3_next", num_hidden_layers=len(kinds), layer_types=kinds)
    with caplog.at_level(logging.WARNING, "slimmoe"):
        told = warned(before, drop_layers=drop)
    left = [kind for layer, kind in enumerate(kinds) if layer not in drop]
    assert bool(told) == broken
    if broken:
        assert f"layers: {len(left)} layers are left of a pattern of 4" in told[0]
        assert told[0] in caplog.text


def test_no_full_attention_is_left():
    before = model("gpt_oss")
    assert before.config.layer_types == [SLIDING, FULL, SLIDING, FULL]
    with pytest.raises(UnsupportedModelError, match=r"none of the layers \[0, 2\] has attention"):
        plan(before, None, CompressionConfig(drop_layers=(1, 3)))
    assert not warned(before, drop_layers=(0, 1))
    assert warned(before, drop_layers=(0, 2))
    # there may be none from the start
    before = model("gpt_oss", layer_types=[SLIDING] * 4)
    assert not warned(before, drop_layers=(3,))


# --- sizes ---------------------------------------------------------------------------------------


def test_narrow_sizes():
    before = model("qwen3_moe", hidden_size=96, moe_intermediate_size=80)
    found = made.statistics(before)
    assert not warned(before, found, hidden_size=64, moe_intermediate_size=64)
    for name in ("hidden_size", "moe_intermediate_size"):
        (told,) = warned(before, found, **{name: 56})
        assert told.startswith(f"{name}: 56 is below 64")
        with pytest.raises(ValueError, match=f"{name}: expected a multiple of 8, got int 60"):
            CompressionConfig(**{name: 60})
    # what was narrow before is not made so
    assert not warned(model("qwen3_moe"), num_layers=2)


# --- experts that calibration hardly saw ---------------------------------------------------------


def test_experts_that_few_tokens_went_to(caplog):
    before = model("qwen3_moe")
    found = made.statistics(before)
    for place, part in found.experts.items():
        part.count[:] = 50
        if place == 2:
            part.count[[1, 6]] = torch.tensor([3.0, 0.0], dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "slimmoe"):
        (told,) = warned(before, found, 32, num_experts=4, expert_method="prune")
    assert told.startswith("layer 2: experts [1, 6] were selected for fewer than 32 tokens")
    assert told in caplog.text
    assert len(warned(before, found, 51, num_experts=4)) == 4
    assert len(warned(before, found, 50, num_experts=4)) == 1
    assert warned(before, found, 32, moe_intermediate_size=16)[-1] == told
    # where nothing of experts is chosen by statistics
    assert not any("experts" in t for t in warned(before, found, 32, hidden_size=16))
    report = plan(before, found, CompressionConfig(num_experts=4)).report
    assert report["2"]["least_tokens"] == 0
    assert report["2"]["mean_tokens"] == (6 * 50 + 3) / 8
    assert report["1"]["least_tokens"] == 50
    with pytest.raises(ValueError, match="minimum_tokens: expected"):
        warned(before, found, -1, num_experts=4)


def test_warnings_are_of_plans(tmp_path):
    before = model("qwen3_moe")
    decided = plan(before, made.statistics(before), CompressionConfig(hidden_size=16))
    assert CompressionPlan.from_json(decided.to_json()) == decided
    old = json.loads(decided.to_json())
    del old["warnings"], old["calibration"]
    assert CompressionPlan.from_json(json.dumps(old)).warnings == []


def test_warnings_on_the_command_line(tmp_path, capsys):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "before")
    calibrate(before, tokens(before, 4, 9), progress=False).save_pretrained(tmp_path / "found")
    args = [tmp_path / "before", "--num-experts", 4, "--hidden-size", 16, "--statistics",
            tmp_path / "found"]  # fmt: skip
    for command, more in (("plan", ["--out", tmp_path / "plan.json"]), ("compress", [])):
        where = [tmp_path / "after"] if command == "compress" else []
        given = [command, args[0], *where, *args[1:], *more]
        assert main([str(arg) for arg in [*given, "--minimum-tokens", 10]]) == 0
        told = capsys.readouterr().out
        assert "hidden_size: 16 is below 64" in told
        assert "were selected for fewer than 10 tokens" in told
        assert "tokens went to the least selected expert of a layer" in told
    assert main([str(arg) for arg in ["plan", *args, "--out", tmp_path / "b", "--json"]]) == 0
    assert any("hidden_size" in t for t in json.loads(capsys.readouterr().out)["warnings"])


# --- the card ------------------------------------------------------------------------------------

SOURCE = """---
license: other
license_name: strange
license_link: LICENSE
language: [en, de]
datasets: [some/data]
tags: [chat]
base_model: org/its-own-base
---
# The model that it was made of
"""


def written(tmp_path, card, **options):
    before = model("qwen3_moe")
    folder = tmp_path / "before"
    before.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    (folder / "LICENSE").write_text("Do as you like.")
    found = calibrate(before, tokens(before, 4, 9), progress=False)
    decided = compress(folder, tmp_path / "after", CompressionConfig(num_experts=4, num_layers=3),
                       statistics=found, progress=False, **options)  # fmt: skip
    return found, decided, ModelCard.load(tmp_path / "after" / "README.md")


def test_a_card(tmp_path):
    found, decided, card = written(tmp_path, SOURCE)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other", "strange", "LICENSE",
    )  # fmt: skip
    assert data["language"] == ["en", "de"]
    assert data["base_model"] == "before"
    assert data["library_name"] == "transformers"
    assert "slimmoe" in data["tags"]
    assert "The model that it was made of" not in card.text
    for said in (
        found.tokens_sha256, f"slimmoe {__version__}", "| experts | 8 | 4 |", "| layers | 4 | 3 |",
        "36 tokens", decided.warnings[0], decided.hash, '"num_experts": 4',
    ):  # fmt: skip
        assert said in card.text, said
    assert decided.calibration == {
        "tokens": 36, "sequences": 4, "tokens_sha256": found.tokens_sha256, "dtype": "float32",
    }  # fmt: skip
    assert (tmp_path / "after" / "LICENSE").read_text() == "Do as you like."
    # what is compressed once more is of the same model
    compress(tmp_path / "after", tmp_path / "again", CompressionConfig(num_layers=2),
             progress=False)  # fmt: skip
    again = ModelCard.load(tmp_path / "again" / "README.md").data
    assert (again.base_model, again.license_name) == ("before", "strange")


@pytest.mark.parametrize(
    "card", [None, "# No header\n", "---\n[broken: \n---\n", "---\n- a\n---\n"]
)
def test_cards_of_sources_that_say_nothing(card, tmp_path):
    _, _, made_card = written(tmp_path, card, base_model="org/name")
    data = made_card.data.to_dict()
    assert "license" not in data
    assert data["base_model"] == "org/name"


def test_a_name_of_the_hub_is_kept(tmp_path, monkeypatch):
    import huggingface_hub

    model("qwen3_moe").save_pretrained(tmp_path / "snapshot")
    (tmp_path / "snapshot" / "README.md").write_text(SOURCE)
    (tmp_path / "snapshot" / "LICENSE").write_text("Do as you like.")
    names = [file.name for file in (tmp_path / "snapshot").iterdir()]

    def download(name, allow_patterns):
        # all that is there is asked for
        assert set(filter_repo_objects(names, allow_patterns=allow_patterns)) == set(names)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = ["--num-layers", "2", "--json"]
    assert main(["compress", "org/model", str(tmp_path / "after"), *options]) == 0
    card = ModelCard.load(tmp_path / "after" / "README.md")
    assert card.data.base_model == "org/model"
    assert card.data.license_name == "strange"
    assert (tmp_path / "after" / "LICENSE").is_file()
    assert "nothing was chosen by data" in card.text


def test_training_is_told(tmp_path, capsys):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "before")
    (tmp_path / "before" / "README.md").write_text(SOURCE)
    tokenizer().save_pretrained(tmp_path / "before")
    compress(tmp_path / "before", tmp_path / "after", CompressionConfig(num_layers=3),
             progress=False)  # fmt: skip
    rows = [{"input_ids": ids} for ids in tokens(before, 8, 9).tolist()]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["distill", tmp_path / "after", tmp_path / "before", tmp_path / "data.jsonl", "--out",
            tmp_path / "run", "--steps", 2, "--batch-size", 4]  # fmt: skip
    for _ in range(2):
        assert main([str(arg) for arg in args]) == 0
    final = tmp_path / "run" / "final"
    card = ModelCard.load(final / "README.md")
    assert card.data.license_name == "strange"
    assert card.text.count("Distilled from before for 2 steps of 4 sequences") == 1
    assert (final / "tokenizer.json").is_file()
    assert not (final / "slimmoe.json").exists()
