"""The command line from prompts to a prediction, on SmolLM2's tokenizer and a tiny model."""

import json
import subprocess
import sys

import pytest
import torch
from forelen import training
from forelen.cli import main
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import AutoTokenizer

COMMANDS = ("collect", "train", "calibrate", "evaluate", "predict", "simulate", "inspect")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a small model, whose answers end, and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.save_pretrained(folder)
    model = tiny_model(
        "mistral", vocab_size=len(tokenizer), max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        # the end token is likely, and depends on the state
        model.lm_head.weight[2] = 1.2 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom forelen.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


def test_from_prompts_to_predictions(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FEWEST", 3)
    prompts = tmp_path / "prompts.txt"
    asked = [f"What is {n} plus {n * n}?" for n in range(40)]
    prompts.write_text("\n".join([*asked, "Too long. " * 90]))
    store, out = tmp_path / "store", tmp_path / "predictor"
    options = ["--out", store, "--samples", 3, "--max-new-tokens", 16, "--batch-size", 20,
               "--max-prompt-tokens", 120]  # fmt: skip
    code, printed = run(capsys, "collect", tiny, "--prompts", prompts, *options, "--json")
    assert code == 0, printed.err
    found = json.loads(printed.out)
    assert found["batches"] == found["batches_done"] == 2
    assert 0 < found["scenarios"][0]["stopped"] < 1
    code, printed = run(capsys, "train", store, "--out", out, "--epochs", 2, "--json")
    assert code == 0, printed.err
    report = json.loads(printed.out)
    assert report["0"]["answers"] == 3 * report["0"]["prompts"]
    code, printed = run(capsys, "evaluate", out, store)
    assert code == 0
    assert "siblings" in printed.out
    code, printed = run(capsys, "inspect", out)
    assert code == 0
    assert "MistralForCausalLM" in printed.out
    code, printed = run(capsys, "inspect", store)
    assert code == 0
    assert "2 of 2 batches" in printed.out
    code, printed = run(capsys, "calibrate", out, store, "--out", tmp_path / "again")
    assert code == 0, printed.err
    prompts.write_text("\n".join(asked))
    code, printed = run(capsys, "predict", out, tiny, "--prompts", prompts, "--json")
    assert code == 0, printed.err
    rows = json.loads(printed.out)
    assert len(rows) == 40
    assert all(row["calibrated"] and not row["fallback"] for row in rows)
    assert all(row["q10"] <= row["q50"] for row in rows)
    some = tmp_path / "some.jsonl"
    some.write_text('{"text": "What is 7 plus 49?"}\n')
    code, printed = run(capsys, "predict", out, tiny, "--prompts", some)
    assert code == 0
    assert "What is 7 plus 49?" in printed.out


def test_simulate(capsys, tmp_path):
    path = tmp_path / "lengths.jsonl"
    rows = [{"length": 1 + n * 37 % 90, "predicted": 1 + n * 37 % 90} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, printed = run(capsys, "simulate", path, "--slots", 8, "--json")
    assert code == 0
    found = json.loads(printed.out)
    plain = found["first come, first served"]
    assert found["longest first"]["makespan"] < plain["makespan"]
    assert found["shortest first"]["mean_completion"] < plain["mean_completion"]
    assert found["shortest first, by turns"]["pauses"] == plain["pauses"] == 0
    code, printed = run(capsys, "simulate", path, "--slots", 8, "--turn", 20, "--json")
    found = json.loads(printed.out)["shortest first, by turns"]
    assert found["makespan"] < plain["makespan"]
    assert found["pauses"] > 0
    code, printed = run(capsys, "simulate", path, "--slots", 100)
    assert code == 0
    assert "no order helps" in printed.out


def test_bad_input(capsys, tiny, tmp_path):
    cases = [
        (["collect", tiny, "--out", tmp_path / "a"], "either a file or scenarios"),
        (["inspect", tmp_path / "none"], "store.json"),
        (["inspect", tiny], "no predictor"),
        (["train", tmp_path / "none", "--out", tmp_path / "b"], "store.json"),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text('{"length": 3}\n')
    cases.append((["simulate", path], "expected predicted"))
    path = tmp_path / "worse.jsonl"
    path.write_text("{\n")
    cases.append((["simulate", path], "line 1: no JSON"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    cases.append((["collect", tiny, "--out", tmp_path / "c", "--prompts", empty], "got none"))
    for arguments, match in cases:
        code, printed = run(capsys, *arguments)
        assert code == 2, arguments
        assert match in printed.err
