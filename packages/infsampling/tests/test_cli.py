"""The command line, on a tiny model with a real tokenizer."""

import json
import subprocess
import sys

import pytest
from infsampling.cli import main
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import AutoTokenizer

COMMANDS = ("plan", "generate", "train", "bench", "simulate", "doctor")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom infsampling.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    assert run(capsys, command, "--help")[0] == 0


def test_plan(capsys):
    base = ("plan", smollm2(), "--group", 64, "--max-new", 1024, "--memory")
    code, printed = run(capsys, *base, "16GiB", "--json")
    found = json.loads(printed.out)
    # 30 layers, 3 heads of 64 in float32 or 16 bits
    assert code == 0 and found["kv_per_token"] in (46080, 23040)
    assert found["prefixes"] == 256 * found["kv_per_token"]
    assert 32 <= found["slots"] <= 64
    few = json.loads(run(capsys, *base, "200MiB", "--json")[1].out)
    assert 1 <= few["slots"] < found["slots"]
    assert few["total"] <= 200 << 20
    code, printed = run(capsys, *base, "16GiB")
    assert code == 0 and "a full group" in printed.out
    assert run(capsys, *base, "lots")[0] == 2
    code, printed = run(capsys, *base, "1MB")
    assert code == 1 and "no slot of" in printed.err


def test_simulate(capsys, tmp_path):
    file = tmp_path / "lengths.jsonl"
    file.write_text("[40, 3, 4, 5, 40, 2]\n[9, 9, 30, 1]\n")
    base = ("simulate", "--lengths", file, "--slots", 2, "--sync-every", 1, "--rerank-every", 1)
    code, printed = run(capsys, *base, "--json")
    found = json.loads(printed.out)["policies"]
    assert code == 0 and len(found) == 9
    assert found["lpt"]["steps"] < found["sjf"]["steps"] < found["rounds"]["steps"]
    assert found["lrpt"]["over_bound"] == 1
    code, printed = run(capsys, *base, "--policy", "turns", "--noise", 0.5)
    assert code == 0 and "turns" in printed.out and "lpt" not in printed.out
    file.write_text("[1, 2]\n[3, -1]\n")
    code, printed = run(capsys, *base)
    assert code == 2 and "line 2" in printed.err


def test_generate_goes_on(capsys, tmp_path, tiny):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(
        '"Two rivers"\n{"prompt": [{"role": "user", "content": "Hello"}]}\n"Two rivers"\n'
    )
    base = ("generate", tiny, "--prompts", prompts, "--out", out, "--group", 4, "--max-new", 6,
            "--max-slots", 8, "--device", "cpu", "--json")  # fmt: skip
    code, printed = run(capsys, *base)
    assert code == 0 and json.loads(printed.out)["sampled"] == 12
    lines = out.read_text().splitlines()
    found = {(x["prompt_index"], x["sample_index"]): x for x in map(json.loads, lines)}
    assert sorted(found) == [(p, s) for p in range(3) for s in range(4)]
    assert {x["finish_reason"] for x in found.values()} <= {"stop", "length"}
    # a prompt that comes again has samples of its own
    assert found[0, 0]["completion"] != found[2, 0]["completion"]
    # stopped in the middle of the sixth line
    out.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    code, printed = run(capsys, *base, "--policy", "turns")
    assert code == 0 and json.loads(printed.out)["there_before"] == 5
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(again) == 12
    for x in again:
        old = found[x["prompt_index"], x["sample_index"]]
        assert x["completion"] == old["completion"]
        assert x["logprob"] == pytest.approx(old["logprob"], abs=1e-3)
    code, printed = run(capsys, *base, "--temperature", 0.5)
    assert code == 2 and "begun with another model" in printed.err
    prompts.write_text('{"text": "no prompt"}\n')
    code, printed = run(capsys, *base)
    assert code == 2 and "line 1" in printed.err


def test_doctor(capsys, tiny, tmp_path):
    code, printed = run(capsys, "doctor", tiny, "--device", "cpu", "--json")
    found = json.loads(printed.out)
    assert code == 0 and found["works"] and found["refused"] is None
    assert found["same_tokens"] and found["same_bits"]
    assert found["error"] < 1e-4
    code, printed = run(capsys, "doctor", tiny, "--device", "cpu")
    assert code == 0 and "bit for bit" in printed.out
    mamba = tmp_path / "mamba"
    tiny_model("mamba").save_pretrained(mamba)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(mamba)
    code, printed = run(capsys, "doctor", mamba, "--device", "cpu")
    assert code == 1 and "It cannot be sampled: model:" in printed.out


def test_train_resumes(capsys, tiny, tmp_path):
    data, reward, out = tmp_path / "data.jsonl", tmp_path / "brief.py", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"count to {n}", "n": n}) + "\n" for n in (3, 4)))
    reward.write_text(
        "def brief(completion_ids, n, **columns):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
        "    return [1.0 * (ids[0] % 2) + 0 * k for ids, k in zip(completion_ids, n)]\n"
    )
    options = {
        "--data": data, "--reward": f"{reward}:brief", "--out": out, "--group": 4, "--batch": 4,
        "--max-new": 4, "--lr": 1e-2, "--schedule": "constant", "--save-steps": 1,
        "--device": "cpu",
    }  # fmt: skip

    def train(**changes):
        given = options | {f"--{name}": value for name, value in changes.items()}
        return run(capsys, "train", tiny, "--json", *(x for pair in given.items() for x in pair))

    code, printed = train(steps=1)
    assert code == 0, printed.err
    assert [line["step"] for line in json.loads(printed.out)["log"]] == [1]
    code, printed = train(steps=3)
    log = json.loads(printed.out)["log"]
    assert code == 0 and [line["step"] for line in log] == [1, 2, 3]
    # the first step was not taken again
    assert (tmp_path / "calls").read_text() == "xxx"
    straight = json.loads(train(steps=3, out=tmp_path / "whole")[1].out)["log"]
    assert [line["reward"] for line in straight] == [line["reward"] for line in log]
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    for change, text in (
        ({"group": 3}, "num_generations"), ({"reward": "brief"}, "module:name"),
        ({"reward": f"{reward}:long"}, "a function in"), ({"reward": "no_such:f"}, "a module"),
        ({"reward": "none.py:f"}, "a file that exists"), ({"steps": 0}, "--steps"),
    ):  # fmt: skip
        code, printed = train(**({"steps": 1} | change))
        assert code == 2 and text in printed.err
    data.write_text('{"text": "x"}\n')
    code, printed = train(steps=1)
    assert code == 2 and "line 1" in printed.err


def test_bench(capsys, tiny):
    base = ("bench", tiny, "--group", 3, "--max-new", 5, "--max-slots", 2, "--rounds", 1)
    code, printed = run(capsys, *base, "--device", "cpu", "--json")
    assert code == 0, printed.err
    arms = json.loads(printed.out)["arms"]
    assert list(arms) == ["infsampling", "generate"]
    for name in arms:
        assert arms[name]["failed"] is None
        assert 3 <= arms[name]["tokens"] <= 15
        assert arms[name]["tokens_per_second"] > 0
    code, printed = run(capsys, *base, "--device", "cpu")
    assert code == 0 and "tokens a second" in printed.out
    assert run(capsys, *base, "--rounds", 0)[0] == 2
