"""The command line on a real model."""

import json
import subprocess
import sys

import pytest
from pskv.cli import main
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import AutoTokenizer

COMMANDS = ("doctor", "plan", "score", "bench", "robustness")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a small model and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.save_pretrained(folder)
    model = tiny_model("mistral", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom pskv.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    code, printed = run(capsys, command, "--help")
    assert code == 0
    assert "MODEL" in printed.out


def test_doctor(capsys, tiny):
    code, printed = run(capsys, "doctor", tiny, "--device", "cpu", "--json")
    found = json.loads(printed.out)
    assert code == 0 and found["refused"] is None
    assert {b["name"] for b in found["backends"]} >= {"split", "layerwise", "replicate"}
    assert all(b["error"] < 1e-4 for b in found["backends"])
    assert found["windows"] == [0, 1, 2, 3] and found["chat_survives"] is True
    code, printed = run(capsys, "doctor", tiny, "--device", "cpu")
    assert code == 0 and "largest error" in printed.out


def test_doctor_refuses(capsys, tmp_path):
    folder = tmp_path / "mamba"
    model = tiny_model("mamba")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    code, printed = run(capsys, "doctor", folder, "--device", "cpu")
    assert code == 1
    assert "It cannot be scored: model:" in printed.out


def test_plan(capsys):
    code, printed = run(capsys, "plan", smollm2(), "--prefix-len", 1024, "--width", 512, "--json")
    found = json.loads(printed.out)
    # 30 layers, 3 heads of 64: 46080 bytes a token in float32, or half of it
    assert code == 0 and found["prefix"] in (1024 * 46080, 1024 * 23040)
    assert found["shared"] < found["layerwise"] < found["replicate"]
    code, printed = run(capsys, "plan", smollm2(), "--prefix-len", 1024)
    assert code == 0 and "held once" in printed.out
    assert run(capsys, "plan", smollm2(), "--prefix-len", -1)[0] == 2


def test_score(capsys, tmp_path):
    prefix, rows = tmp_path / "prefix.txt", tmp_path / "rows.jsonl"
    prefix.write_text("The capital of France is")
    rows.write_text('" Paris"\n" Rome"\n{"text": " a kettle"}\n')
    arguments = ("score", smollm2(), "--prefix", prefix, "--continuations", rows)
    code, printed = run(capsys, *arguments, "--device", "cpu")
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert code == 0
    assert found[0]["logprob"] > found[1]["logprob"] > found[2]["logprob"]
    out = tmp_path / "out.jsonl"
    code, _ = run(capsys, *arguments, "--out", out, "--chat", "--reduction", "mean")
    assert code == 0 and len(out.read_text().splitlines()) == 3
    rows.write_text('{"text": " Paris", "target": "."}\n" Rome"\n')
    code, printed = run(capsys, *arguments)
    assert code == 2 and "line 2" in printed.err
    rows.write_text("")
    assert run(capsys, *arguments)[0] == 2


def test_bench(capsys, tiny):
    sizes = ("--prefix-len", 40, "--width", 8, "--suffix", 6, "--tail", 2, "--target", 4)
    code, printed = run(
        capsys, "bench", tiny, *sizes, "--seconds", 0.5, "--device", "cpu", "--backend", "split",
        "--json",
    )  # fmt: skip
    found = json.loads(printed.out)
    assert code == 0
    assert [arm["name"] for arm in found["arms"]] == ["no cache", "replicate", "layerwise", "pskv"]
    assert found["baseline"] == "replicate"
    code, printed = run(capsys, "bench", tiny, *sizes, "--against", "best", "--device", "cpu")
    assert code == 2 and "against: expected" in printed.err


@pytest.mark.filterwarnings("ignore:pskv.search is for")
def test_robustness(capsys, tiny, tmp_path):
    out, other = tmp_path / "a.json", tmp_path / "b.json"
    arguments = ("robustness", tiny, "--steps", 2, "--width", 4, "--seeds", 2, "--device", "cpu")
    assert run(capsys, *arguments, "--out", other)[0] == 0
    code, printed = run(
        capsys, *arguments, "--out", out, "--system", "Be brief.", "--against", other
    )
    assert code == 0
    assert "| searches | 4 |" in printed.out and "Paired with the other report" in printed.out
    code, printed = run(capsys, *arguments, "--out", out, "--search", "beam")
    assert code == 2 and "other settings" in printed.err


def test_bad_input(capsys, tmp_path):
    assert run(capsys, "doctor")[0] == 2
    code, printed = run(capsys, "plan", tmp_path, "--prefix-len", 5)
    assert code == 2 and "error:" in printed.err
