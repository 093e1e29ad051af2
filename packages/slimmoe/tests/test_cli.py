"""The command line: what it does, prints and refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from slimmoe.cli import main
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import model, tokens


@pytest.fixture
def folder(tmp_path):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "before")
    rows = [{"input_ids": ids} for ids in tokens(before, 20, 30).tolist()]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_from_data_to_a_checked_model(folder, capsys):
    before, after = folder / "before", folder / "after"
    status, out, _ = run(capsys, "inspect", before, "--json")
    told = json.loads(out)
    assert status == 0
    assert (told["family"], told["experts"], told["layers_with_experts"]) == (
        "qwen3_moe", 8, [0, 1, 2, 3],
    )  # fmt: skip
    status, out, _ = run(capsys, "calibrate", before, folder / "data.jsonl", "--out",
                         folder / "statistics", "--json")  # fmt: skip
    assert status == 0
    assert json.loads(out)["tokens"] == 600
    sizes = ("--num-experts", 4, "--hidden-size", 16, "--importance", "soft")
    status, out, _ = run(capsys, "plan", before, *sizes, "--statistics", folder / "statistics",
                         "--out", folder / "plan.json", "--json")  # fmt: skip
    assert status == 0
    planned = json.loads(out)
    assert planned["after"]["experts"] == 4
    status, out, _ = run(capsys, "compress", before, after, "--plan", folder / "plan.json")
    assert status == 0
    assert "before" in out
    assert "after" in out
    assert "of selections went to experts that are not kept" in out
    status, out, _ = run(capsys, "verify", after, "--source", before, "--json")
    assert status == 0
    assert json.loads(out)["logits"] == 0
    status, out, _ = run(capsys, "inspect", after, "--json")
    assert json.loads(out)["parameters"] == planned["after"]["parameters"]
    # the same in one step
    status, _, _ = run(capsys, "compress", before, folder / "other", *sizes, "--data",
                       folder / "data.jsonl")  # fmt: skip
    assert status == 0
    found = [AutoModelForCausalLM.from_pretrained(path).state_dict()
             for path in (after, folder / "other")]  # fmt: skip
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_distillation_goes_on(folder, capsys):
    before, after, out = folder / "before", folder / "after", folder / "run"
    run(capsys, "compress", before, after, "--drop-layers", 1)
    plain = ("distill", after, before, folder / "data.jsonl", "--batch-size", 4,
             "--save-steps", 2, "--logging-steps", 1, "--learning-rate", 1e-3)  # fmt: skip
    args = (*plain, "--out", out)
    status, text, err = run(capsys, *args, "--steps", 4, "--json")
    assert status == 0, err
    told = json.loads(text)
    assert told["sequences"] == 20
    assert {"kl", "lm", "kd_weight"} <= told.keys()
    assert (out / "checkpoint-4").is_dir()
    AutoModelForCausalLM.from_pretrained(out / "final")
    status, _, err = run(capsys, "cache-teacher", before, folder / "data.jsonl", "--out",
                         folder / "cache", "--tokens", 8)  # fmt: skip
    assert status == 0, err
    status, text, err = run(
        capsys, "distill", after, before, folder / "data.jsonl", "--out", folder / "cached",
        "--steps", 2, "--logging-steps", 1, "--cache", folder / "cache", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(text)["sequences"] == 20
    # what is there is not done again
    status, text, _ = run(capsys, *args, "--steps", 6)
    assert status == 0
    assert (out / "checkpoint-6").is_dir()
    assert "kd_weight" in text
    # a teacher whose layers stay in the host's memory says the same
    status, text, err = run(capsys, *plain, "--out", folder / "streamed", "--steps", 4, "--offload",
                            "--json")  # fmt: skip
    assert status == 0, err
    streamed = json.loads(text)
    assert all(streamed[name] == told[name] for name in ("kl", "lm", "load_balancing"))
    for name in ("offload", "dequantize"):
        both = (f"--{name}", "--cache", folder / "cache")
        status, _, err = run(capsys, *plain, "--out", folder / "x", "--steps", 1, *both)
        assert status == 2
        assert f"{name}: expected no cache beside it" in err
    status, text, err = run(capsys, *plain, "--out", folder / "plain", "--steps", 1, "--json",
                            "--router-aux-loss-coef", 0)  # fmt: skip
    assert status == 0, err
    assert "load_balancing" not in json.loads(text)


def test_tables_for_people(folder, capsys):
    status, out, _ = run(capsys, "inspect", folder / "before")
    assert status == 0
    assert "qwen3_moe" in out
    assert "active parameters" in out


@pytest.mark.parametrize(("args", "match"), [
    (("compress", "{before}", "{out}"), "nothing is made smaller"),
    (("compress", "{before}", "{out}", "--num-experts", "4"), "something to choose by"),
    (("compress", "{before}", "{out}", "--num-experts", "4", "--data", "{before}/config.json"),
     "texts or JSON lines"),
    (("compress", "{before}", "{out}", "--plan", "x", "--num-layers", "2"), "without other sizes"),
    (("plan", "{before}", "--num-layers", "9", "--out", "{out}"), "num_layers: expected 1 to 4"),
    (("verify", "{before}"), "slimmoe.json"),
])  # fmt: skip
def test_bad_input(args, match, folder, capsys):
    places = {"before": folder / "before", "out": folder / "out"}
    status, _, err = run(capsys, *(arg.format(**places) for arg in args))
    assert status == 2
    assert match in err
    assert not (folder / "out").exists()


def test_a_model_that_cannot_be_compressed(tmp_path, capsys):
    from transformers import LlamaConfig

    found = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4,
    ))  # fmt: skip
    found.save_pretrained(tmp_path / "llama")
    status, out, _ = run(capsys, "inspect", tmp_path / "llama")
    assert status == 1
    assert "got 'llama'" in out
    status, out, _ = run(capsys, "inspect", tmp_path / "llama", "--json")
    assert json.loads(out)["works"] is False


def test_data_files(tmp_path):
    from slimmoe.datafiles import read_data

    (tmp_path / "a.txt").write_text("one text\n\nof two paragraphs")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    assert read_data([tmp_path]) == ["one text\n\nof two paragraphs", "two", "three"]
    (tmp_path / "c.jsonl").write_text('{"input_ids": [1, 2]}\n')
    assert read_data([tmp_path / "c.jsonl"]) == [[1, 2]]
    with pytest.raises(ValueError, match="data: expected texts or token ids, got str 'both'"):
        read_data([tmp_path])
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n{"texts": 1}\n')
    with pytest.raises(ValueError, match=r"d.jsonl:2: expected text or input_ids"):
        read_data([tmp_path / "d.jsonl"])
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"d.jsonl:1: no JSON"):
        read_data([tmp_path / "d.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none there"):
        read_data([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError):
        read_data([tmp_path / "no.txt"])
