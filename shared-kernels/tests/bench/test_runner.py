import json
import os
import subprocess
import sys

import pytest
import torch
from shared_kernels.bench import Plan, ceilings, load_benchmarks, run_file, timing
from shared_kernels.bench.__main__ import main
from shared_kernels.testing.imports import assert_does_not_load

QUICK = Plan(warmup=1, min_rounds=5, min_seconds=0.0)
FILE = """
import os
import torch
from shared_kernels.bench import Arm, Workload, benchmark

def workload(name, check=lambda: True, fn=lambda: None):
    x = torch.randn(1000)
    arms = [Arm(name="copy", fn=x.clone, bytes=2 * x.nbytes), Arm(name="ours", fn=fn)]
    return Workload(
        name=name, params={"n": 1000}, arms=arms, baseline="copy", check=check
    )

@benchmark
def good(device):
    yield workload("good/one")
    yield workload("good/two")

@benchmark
def strict(device):
    return [workload("strict", lambda: os.environ["SHARED_KERNELS_STRICT"] == "1")]

def not_registered(device):
    raise AssertionError
"""
BAD = (
    FILE
    + """
def fails():
    assert 1 == 2, "ours differs"

@benchmark
def gate_false(device):
    timed = lambda: print("TIMED")
    yield workload("gate/false", lambda: False, timed)
    yield workload("gate/raises", fails, timed)

@benchmark
def broken(device):
    raise RuntimeError("no inputs")
    yield

@benchmark
def arm_broken(device):
    yield workload("arm/broken", fn=lambda: 1 / 0)
"""
)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "_CPU_COPY_BYTES", 1 << 20)
    monkeypatch.delenv("SHARED_KERNELS_STRICT", raising=False)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    return path


def names(result):
    return [row["name"] for row in result["workloads"]]


def test_a_file_registers_its_decorated_functions_in_order(good):
    assert list(load_benchmarks(good)) == ["good", "strict"]


def test_results_of_a_file(good):
    result = run_file(good, device="cpu", plan=QUICK)
    assert names(result) == ["good/one", "good/two", "strict"]
    assert result["refused"] == []
    assert result["device"] == "cpu"
    assert list(result["ceilings"]) == ["device_copy"]
    assert result["provenance"]["command"] == "python -m shared_kernels.bench good.py"
    assert result["workloads"][0]["params"] == {"n": 1000}
    assert [arm["rounds"] for arm in result["workloads"][0]["arms"]] == [5, 5]


def test_strictness_ends_with_the_run(good, monkeypatch):
    run_file(good, only="strict", device="cpu", plan=QUICK)
    assert "SHARED_KERNELS_STRICT" not in os.environ
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "0")
    assert names(run_file(good, only="strict", device="cpu", plan=QUICK)) == ["strict"]
    assert os.environ["SHARED_KERNELS_STRICT"] == "0"


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("good", ["good/one", "good/two"]),
        ("good/two", ["good/two"]),
        ("*t*", ["good/two", "strict"]),
    ],
)
def test_only(good, only, expected):
    result = run_file(good, only=only, device="cpu", plan=QUICK)
    assert names(result) == expected
    assert result["provenance"]["command"].endswith(f"good.py --only {only}")


def test_what_is_wrong_is_refused_and_never_timed(bad, capsys):
    result = run_file(bad, device="cpu", plan=QUICK)
    assert names(result) == ["good/one", "good/two", "strict"]
    reasons = {entry["name"]: entry["reason"] for entry in result["refused"]}
    assert reasons == {
        "gate/false": "GateError: the check returned False",
        "gate/raises": "GateError: the check failed: AssertionError: ours differs",
        "broken": "RuntimeError: no inputs",
        "arm/broken": "ZeroDivisionError: division by zero",
    }
    assert "TIMED" not in capsys.readouterr().out


def test_bad_input(good, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is none at .*missing\.py"):
        run_file(tmp_path / "missing.py", device="cpu")
    with pytest.raises(ValueError, match=r"'nope'.*good\.py \(good, strict\).*good/one"):
        run_file(good, only="nope", device="cpu")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match="at least one function marked with @benchmark"):
        run_file(empty, device="cpu")


def test_a_missing_gpu_is_bad_input(good, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda'; torch sees none"):
        run_file(good, device="cuda")


def test_exit_codes(good, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "Plan", lambda: QUICK)
    assert main([str(good), "--device", "cpu"]) == 0
    assert "| `good/one` | copy |" in capsys.readouterr().out
    assert main([str(bad), "--only", "gate_false", "--device", "cpu"]) == 1
    assert main([str(good), "--only", "nope"]) == 2
    assert main([str(tmp_path / "missing.py")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_a_time_budget_is_part_of_the_command(good):
    command = run_file(good, plan=Plan(min_rounds=3, max_seconds=7.5))["provenance"]["command"]
    assert command.endswith("good.py --seconds 7.5")


def test_the_command_writes_a_file_and_prints_json(good, tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, "-m", "shared_kernels.bench", str(good)]
    command += ["--out", str(out), "--only", "good/one", "--device", "cpu", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    [result] = json.loads(run.stdout)
    assert names(result) == ["good/one"]
    assert result["workloads"][0]["arms"][0]["rounds"] >= 30
    assert "good/one" in run.stderr
    assert [path.name for path in out.iterdir()] == ["good-good-one-cpu.json"]
    assert json.loads((out / "good-good-one-cpu.json").read_text()) == result


def test_the_command_needs_no_command_line_library(good):
    code = (
        "from pathlib import Path; from shared_kernels.bench.runner import load_benchmarks; "
        f"load_benchmarks(Path({str(good)!r}))"
    )
    assert_does_not_load(code, {"cyclopts", "triton", "transformers", "matplotlib"})


def test_help_is_cheap():
    assert_does_not_load("from shared_kernels.bench.__main__ import main; main(['--help'])")
