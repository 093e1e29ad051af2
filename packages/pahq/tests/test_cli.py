"""The command line, on a tiny model with a real tokenizer."""

import json
import subprocess
import sys

import pytest
import torch
from pahq import Circuit
from pahq.cli import main
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import AutoTokenizer

COMMANDS = ("find", "eval", "compare", "draw", "convert", "tasks", "doctor")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def circuit(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found") / "acdc"
    assert find(tiny, folder, "--threshold", 1e-4, "--no-judge") == 0
    return folder


def find(model, out, *options):
    return main([str(x) for x in ("find", model, "--out", out, "--examples", 2, "--min-accuracy", 0,
                                  *options)])  # fmt: skip


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom pahq.cli import main\n"
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


def test_find_and_judge(tiny, tmp_path, capsys):
    out = tmp_path / "circuit"
    assert find(tiny, out, "--threshold", 1e-4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    circuit = Circuit.from_pretrained(out)
    assert found["edges"] == len(circuit) > 0
    assert found["of"] == circuit.graph.edges
    assert found["tested"] + found["skipped"] == circuit.graph.edges
    report = found["faithfulness"]
    assert len(report["task"]["random"]) == 20
    assert report["held_out"]["pairs"] == 2
    assert report["task"]["circuit"]["kl"] == pytest.approx(circuit.provenance["value"], rel=1e-3)
    assert circuit.provenance["task_source"] == "ioi"
    assert not (tmp_path / "circuit.search").exists()
    code, printed = run(capsys, "eval", out, "--plot", tmp_path / "x.svg")
    assert code == 2
    assert "--plot" in printed.err
    code, printed = run(capsys, "find", tiny, "--out", out)
    assert code == 2
    assert "is not empty" in printed.err


def test_find_goes_on(tiny, circuit, tmp_path, monkeypatch, capsys):
    from pahq import acdc

    plain, seen = acdc.Acdc.layer, []

    def stops(search, layer):
        seen.append(layer)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(search, layer)

    monkeypatch.setattr(acdc.Acdc, "layer", stops)
    out = tmp_path / "again"
    with pytest.raises(SystemExit):
        find(tiny, out, "--threshold", 1e-4, "--no-judge")
    assert (tmp_path / "again.search").is_dir()
    assert find(tiny, out, "--threshold", 1e-4, "--no-judge") == 0
    layers = Circuit.from_pretrained(circuit).graph.layers
    assert seen == [layers, layers - 1, *reversed(range(layers))]
    code, printed = run(capsys, "compare", circuit, out, "--json")
    assert code == 0
    same = json.loads(printed.out[printed.out.index("{") :])
    assert same["jaccard"] == 1
    assert same["same_weights"]


@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_scores(tiny, tmp_path, capsys, method):
    out = tmp_path / method
    assert find(tiny, out, "--method", method, "--no-judge", "--json") == 0
    capsys.readouterr()
    assert len(Circuit.from_pretrained(out)) == Circuit.from_pretrained(out).graph.edges
    code, printed = run(capsys, "eval", out, "--sizes", "--json")
    assert code == 0
    found = json.loads(printed.out)
    assert len(found["sizes"]["recovered"]) == 10
    assert found["held_out"]["pairs"] == 2
    best = tmp_path / "best"
    assert find(tiny, best, "--method", method, "--top", 10, "--no-judge") == 0
    assert len(Circuit.from_pretrained(best)) == 10


def test_pairs_of_a_file(tiny, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    line = {"clean": "one two three", "corrupted": "one six three", "answer": " four",
            "wrong_answer": " five"}  # fmt: skip
    other = line | {"clean": "one nine three"}
    path.write_text("".join(json.dumps(x) + "\n" for x in (line, line, other, line)))
    out = tmp_path / "circuit"
    assert find(tiny, out, "--task", path, "--json", "--threshold", 1e-5) == 0
    found = json.loads(capsys.readouterr().out)
    # the third pair is left for judging; the fourth is among the first
    assert found["faithfulness"]["held_out"]["pairs"] == 1
    path.write_text((json.dumps(line) + "\n") * 3)
    assert find(tiny, tmp_path / "all", "--task", path, "--json", "--threshold", 1e-5) == 0
    assert json.loads(capsys.readouterr().out)["faithfulness"]["held_out"] is None
    # a pair that is left for judging and is wrong is refused before work starts
    path.write_text("".join(json.dumps(x) + "\n" for x in (line, line, line | {"clean": "one"})))
    assert find(tiny, tmp_path / "no", "--task", path, "--threshold", 1e-5) == 2
    assert not (tmp_path / "no.search").exists()
    assert "as many tokens" in capsys.readouterr().err
    path.write_text(json.dumps(line) + "\n{}\n")
    code, printed = run(capsys, "find", tiny, "--out", tmp_path / "no", "--task", path)
    assert code == 2
    assert "line 2" in printed.err


def test_draw_and_convert(circuit, tmp_path, capsys):
    found = Circuit.from_pretrained(circuit)
    for ending in ("html", "svg", "dot"):
        assert run(capsys, "draw", circuit, tmp_path / f"c.{ending}", "--top", 5)[0] == 0
        assert (tmp_path / f"c.{ending}").stat().st_size > 500
    assert run(capsys, "draw", circuit, tmp_path / "c.png")[0] == 2
    for form, name in (("mib-json", "c.json"), ("mib-pt", "c.pt"), ("auto-circuit", "c.st")):
        code, printed = run(capsys, "convert", circuit, tmp_path / name, "--to", form)
        assert code == 0, printed.err
        back = tmp_path / f"back-{form}"
        code, printed = run(
            capsys, "convert", tmp_path / name, back, "--to", "folder", "--form", form,
            *(("--like", circuit) if form == "auto-circuit" else ()),
        )  # fmt: skip
        assert code == 0, printed.err
        from pahq import formats

        assert torch.equal(
            formats.grouped(Circuit.from_pretrained(back), found.graph.key_heads).present,
            found.present,
        )
    code, printed = run(capsys, "convert", tmp_path / "c.st", tmp_path / "x", "--to", "folder",
                        "--form", "auto-circuit")  # fmt: skip
    assert code == 2
    assert "--like" in printed.err


def test_tasks_and_doctor(tiny, tmp_path, capsys):
    code, printed = run(capsys, "tasks", "--json")
    assert code == 0
    assert {"ioi", "greater_than", "induction"} <= set(json.loads(printed.out))
    code, printed = run(capsys, "tasks", "--model", tiny, "--examples", 2, "--json")
    assert code == 0
    assert "top1" in json.loads(printed.out)["induction"]
    code, printed = run(capsys, "doctor", tiny, "--json")
    assert code == 0
    told = json.loads(printed.out)
    assert told["works"]
    assert told["rows"] == "changes"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for family, works in (("gemma2", True), ("granite", False)):
        folder = tmp_path / family
        tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        code, printed = run(capsys, "doctor", folder, "--json")
        assert code == 1 - works
        told = json.loads(printed.out)
        assert told["works"] is works
        # heads of a layer share a norm
        assert told.get("rows") == ("whole runs" if works else None)


def test_precision_and_memory(tiny, tmp_path):
    options = ("--threshold", 0.1, "--no-judge", "--precision", "bf16-delta")
    assert find(tiny, tmp_path / "low", *options, "--memory-budget", 1e-6) == 0
    assert find(tiny, tmp_path / "high", "--threshold", 0.1, "--no-judge") == 0
    low, high = (Circuit.from_pretrained(tmp_path / name) for name in ("low", "high"))
    assert torch.equal(low.present, high.present)
    assert low.provenance["precision"] == "bf16-delta"
    assert low.provenance["batches"] > high.provenance["batches"]


@pytest.mark.parametrize(("options", "match"), [
    (("--task", "poetry"), "--task"), (("--top", 3), "--top"), (("--examples", 0), "--examples"),
    (("--method", "eap", "--ablation", "zero"), "--ablation"),
    (("--method", "eap", "--threshold", 0.1), "--threshold"), (("--ig-steps", 3), "--ig-steps"),
    (("--method", "exact", "--direct-edges"), "--direct-edges"),
    (("--method", "exact", "--order", "reverse"), "--order"),
    (("--method", "eap", "--precision", "fp32"), "--precision"),
    (("--memory-budget", 0), "--memory-budget"),
    (("--method", "eap", "--memory-budget", 1), "--memory-budget"),
    (("--method", "eap-ig", "--max-rows", 8), "--max-rows"),
])  # fmt: skip
def test_bad_options(tiny, tmp_path, capsys, options, match):
    code, printed = run(capsys, "find", tiny, "--out", tmp_path / "x", *options)
    assert code == 2
    assert match in printed.err
    assert not (tmp_path / "x").exists()


def test_layers_in_the_hosts_memory(tiny, circuit, tmp_path):
    options = ("--threshold", 1e-4, "--no-judge", "--offload", "--device", "cpu")
    assert find(tiny, tmp_path / "offloaded", *options) == 0
    was, now = (Circuit.from_pretrained(folder) for folder in (circuit, tmp_path / "offloaded"))
    assert torch.equal(now.present, was.present)
    assert torch.equal(now.scores.nan_to_num(7), was.scores.nan_to_num(7))


def test_a_launch_of_two_processes(tiny, circuit, tmp_path):
    out = tmp_path / "together"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "pahq", "find", tiny, "--out", str(out), "--examples", "2", "--min-accuracy", "0",
        "--threshold", "1e-4", "--no-judge", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # one of them tells
    assert json.loads(done.stdout)["out"] == str(out)
    was, now = (Circuit.from_pretrained(folder) for folder in (circuit, out))
    assert torch.equal(now.present, was.present)


def test_a_task_that_the_model_cannot_do_is_refused(tiny, tmp_path, capsys):
    code, printed = run(capsys, "find", tiny, "--out", tmp_path / "x", "--min-accuracy", 1)
    assert code == 2
    assert "accuracy" in printed.err
