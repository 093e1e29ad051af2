"""The command line, in process and through a subprocess: output, JSON and exit status."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_kernels.testing.models import tiny_model
from zo2 import LogRecord, TrainConfig, UpdateLog, ZOConfig
from zo2.cli import main
from zo2.fingerprint import make_header, parameter_entries
from zo2.log import FLUSH, SKIPPED


@pytest.fixture
def folder(tmp_path):
    tensors = {"w": torch.randn(30, 40), "b": torch.randn(40)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    entries = parameter_entries(
        list(tensors.items()),
        units={"w": 0, "b": 1},
        decay={"w"},
        stores={"w": "fp32", "b": "fp32"},
    )
    with UpdateLog.create(
        tmp_path / "run.zolog", make_header(entries, ZOConfig(), fold_every=1)
    ) as log:
        for t in range(6):
            log.append(LogRecord(t, t, 0.1, 0.0, [float(t)]))
        log.append(LogRecord(6, 9, 0.0, 0.0, [0.0], FLUSH))
        log.append(LogRecord(6, 10, 0.1, 0.0, [float("inf")], SKIPPED))
    return tmp_path


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


def test_show(folder, capsys):
    status, out, _ = run(capsys, "log", "show", folder / "run.zolog", "--last", 3, "--json")
    shown = json.loads(out)
    assert status == 0
    assert (shown["records"], shown["parameters"], shown["elements"]) == (8, 2, 1240)
    assert [r["flags"] for r in shown["last"]] == [[], ["flush"], ["skipped"]]
    assert shown["last"][-1]["g"] == ["inf"]
    status, out, _ = run(capsys, "log", "show", folder / "run.zolog")
    assert status == 0
    assert "gaussian" in out
    assert "skipped" in out


def test_verify_names_the_fault_and_truncate_cuts_it(folder, capsys):
    log = folder / "run.zolog"
    status, out, _ = run(capsys, "log", "verify", log)
    assert (status, "sound" in out) == (0, True)
    data = bytearray(log.read_bytes())
    data[-32 * 3 + 1] ^= 255
    log.write_bytes(data + b"torn")
    status, out, _ = run(capsys, "log", "verify", log)
    assert status == 1
    assert "5 records are usable" in out
    assert "record 5 at byte" in out
    assert "torn tail: 4 bytes" in out
    status, out, _ = run(capsys, "log", "verify", log, "--json")
    report = json.loads(out)
    assert (status, report["ok"], report["usable"]) == (1, False, 5)
    assert [d["kind"] for d in report["damage"]] == ["checksum", "torn tail"]
    status, _, err = run(capsys, "replay", folder / "base", log, "--out", folder / "out")
    assert (status, "record 5 at byte" in err) == (2, True)
    status, out, _ = run(capsys, "log", "truncate", log, report["usable"], "--json")
    assert (status, json.loads(out)["before"]) == (0, 8)
    assert run(capsys, "log", "verify", log)[0] == 0
    status, _, err = run(capsys, "log", "truncate", log, 99)
    assert (status, "0 to 5 records, got 99" in err) == (2, True)


def test_diff(folder, capsys):
    log, other = folder / "run.zolog", folder / "other.zolog"
    other.write_bytes(log.read_bytes())
    assert run(capsys, "log", "diff", log, other)[0] == 0
    with UpdateLog.open(other, "a") as opened:
        opened.truncate(3)
        opened.append((3, 3, 0.1, 0.0, [7.0]))
    status, out, _ = run(capsys, "log", "diff", log, other, "--json")
    assert status == 1
    assert json.loads(out) == {
        "same": False, "header": [], "records": [8, 4], "first_difference": 3
    }  # fmt: skip
    with UpdateLog.create(folder / "third.zolog", {"q": 2}) as opened:
        opened.append((0, 0, 0.1, 0.0, [1.0, 2.0]))
    status, out, _ = run(capsys, "log", "diff", log, folder / "third.zolog", "--json")
    found = json.loads(out)
    assert (status, found["first_difference"]) == (1, 0)
    assert {"q", "eps", "parameters"} <= set(found["header"])


def test_replay(folder, capsys):
    args = ("replay", folder / "base", folder / "run.zolog", "--device", "cpu")
    status, out, _ = run(capsys, *args, "--out", folder / "out", "--json")
    assert (status, json.loads(out)["out"]) == (0, str(folder / "out"))
    new, old = (load_file(folder / f / "model.safetensors") for f in ("out", "base"))
    assert not torch.equal(new["w"], old["w"])
    assert (folder / "out" / "config.json").exists()
    status, _, _ = run(capsys, *args, "--out", folder / "none", "--upto", 0)
    assert status == 0
    assert torch.equal(load_file(folder / "none" / "model.safetensors")["w"], old["w"])
    status, _, err = run(capsys, *args, "--out", folder / "out")
    assert (status, "not empty" in err) == (2, True)


@pytest.mark.parametrize(
    "args",
    [
        ("log", "verify", "missing.zolog"),
        ("log", "verify"),
        ("log", "verify", "a", "--colour"),
        ("log", "shred", "a"),
        ("replay", "base", "log"),
        ("nonsense",),
        ("log", "truncate", "a", "many"),
    ],
)
def test_bad_input_is_status_2_with_words_on_stderr(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *args)
    assert status == 2
    assert out == ""
    assert err.strip()


def test_as_a_program(folder):
    np.testing.assert_equal(
        [
            subprocess.run([sys.executable, "-m", "zo2", *args], capture_output=True).returncode
            for args in (
                ["--help"],
                ["log", "verify", str(folder / "run.zolog")],
                ["log", "verify"],
            )
        ],
        [0, 0, 2],
    )
    shown = subprocess.run(
        [sys.executable, "-m", "zo2", "log", "show", str(folder / "run.zolog"), "--json"],
        capture_output=True,
        text=True,
    )
    assert json.loads(shown.stdout)["q"] == 1


RATES = {"h2d": 5e10, "d2h": 5e10, "duplex": 9e10, "d2d": 4e12, "gemm": 6e14, "rng": 6e11}


def test_plan(tmp_path, capsys):
    tiny_model("opt").config.save_pretrained(tmp_path)
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    args = ("plan", tmp_path, "--tokens", 64, "--bandwidth", tmp_path / "rates.json")
    status, out, _ = run(capsys, *args, "--q", 2, "--store", "fp32", "--json")
    found = json.loads(out)
    assert (status, found["n_blocks"], found["store"]) == (0, 4, {"float32": "fp32"})
    assert found["bandwidth"] == RATES
    status, out, _ = run(capsys, *args, "--host", "1kB")
    assert (status, "DOES NOT FIT" in out) == (1, True)
    status, _, err = run(capsys, *args, "--gpu", "lots")
    assert (status, "'lots'" in err) == (2, True)


FLAGS = {
    ("plan",): {
        "--model",
        "--tokens",
        "--batch-size",
        "--dtype",
        "--q",
        "--micro-batch-size",
        "--gpu",
        "--host",
        "--store",
        "--fold-every",
        "--prefetch",
        "--bandwidth",
        "--json",
    },
    ("log", "show"): {"--path", "--last", "--json"},
    ("log", "verify"): {"--path", "--json"},
    ("log", "truncate"): {"--path", "--records", "--json"},
    ("log", "diff"): {"--first", "--second", "--json"},
    ("train",): {
        "--config",
        "--model",
        "--data",
        "--output-dir",
        "--eval-data",
        "--lr",
        "--lr-scheduler",
        "--steps",
        "--batch-size",
        "--max-length",
        "--dtype",
        "--resume",
        "--set",
        "--dry-run",
        "--json",
    },
    ("bench", "rng"): {"--elements", "--device", "--json"},
    ("bench", "pcie"): {"--device", "--json"},
    ("bench", "step"): {"--model", "--tokens", "--gpu", "--dtype", "--device", "--json"},
    ("replay",): {"--base", "--log", "--out", "--upto", "--device", "--json"},
}


@pytest.mark.parametrize("command", FLAGS)
def test_the_set_of_flags_is_frozen(command, capsys):
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    found = {w.strip(",") for w in out.replace("│", " ").split() if w.startswith("--")}
    assert found - {"--help"} == FLAGS[command]


def test_train_has_no_more_flags_than_agreed_and_every_field_of_its_config():
    fields = {f.name for f in dataclasses.fields(TrainConfig)} - {"zo", "offload", "trainer"}
    flags = {flag[2:].replace("-", "_") for flag in FLAGS["train",]}
    assert len(flags) <= 15
    assert flags - {"config", "set", "dry_run", "json"} == fields
