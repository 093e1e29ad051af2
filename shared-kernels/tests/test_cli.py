import json
import os
import re
import subprocess
import sys

import pytest
from shared_kernels import cli, diagnostics
from shared_kernels.testing.imports import HEAVY_MODULES, assert_does_not_load
from shared_kernels.versions import __version__

COMMANDS = {
    "env": {"--json"},
    "doctor": {"--json"},
    "bench": {"--out", "--only", "--device", "--seconds", "--json"},
    "report": {"--results", "--check"},
}


def shared_kernels(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-c", "from shared_kernels.cli import main; main()", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def exit_code(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_cheap(command):
    arguments = [*command, "--help"]
    code = f"from shared_kernels.cli import main; main({arguments})"
    assert_does_not_load(code, HEAVY_MODULES - {"cyclopts"})


def test_help_names_the_commands(capsys):
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(("command", "options"), COMMANDS.items())
def test_the_options_are_these(command, options, capsys):
    assert exit_code(command, "--help") == 0
    assert set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) == options


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "frob"),
        (["env", "--jsn"], "--json"),
        (["bench"], "FILE"),
        (["bench", "x.py", "--device", "tpu"], "tpu"),
        (["report"], "README"),
    ],
)
def test_bad_input_exits_with_2_and_speaks_on_stderr(arguments, message, capsys):
    assert exit_code(*arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_env_as_json():
    run = shared_kernels("env", "--json", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found) == {"versions", "flags", "cpu", "gpu", "memory"}
    assert found["versions"]["shared-kernels"] == __version__
    assert found["flags"]["OMP_NUM_THREADS"] == "1"
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert {"cgroup_free", "memlock"} < set(found["memory"])


def test_env_as_a_table(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert exit_code("env") == 0
    text = capsys.readouterr().out
    assert "shared-kernels" in text
    assert "GiB" in text


def test_doctor_finds_this_machine_well():
    run = shared_kernels("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(run.stdout)}
    failed = {name: check for name, check in checks.items() if check["status"] == "fail"}
    assert not failed
    assert run.returncode == 0, run.stderr
    assert list(checks) == [
        "torch",
        "GPU",
        "triton kernels",
        "CPU kernels",
        "pinned memory",
        "host memory",
    ]
    assert "equals the reference" in checks["triton kernels"]["detail"]
    assert "equals the reference" in checks["CPU kernels"]["detail"]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_exits_with_1_only_for_failures(status, code, monkeypatch, capsys):
    checks = [diagnostics.Check("a thing", status, "as found", "do this")]
    monkeypatch.setattr(diagnostics, "run_checks", lambda: checks)
    assert exit_code("doctor", "--json") == code
    assert json.loads(capsys.readouterr().out)[0]["status"] == status
    assert exit_code("doctor") == code
    text = capsys.readouterr().out
    assert all(word in text for word in (status, "a thing", "as found", "do this"))


def test_bench_and_report(tmp_path, capsys):
    assert exit_code("bench", str(tmp_path / "missing.py")) == 2
    readme = tmp_path / "README.md"
    readme.write_text("no blocks\n")
    assert exit_code("report", str(readme), "--check") == 0
    readme.write_text("<!-- bench:missing -->\n<!-- /bench -->\n")
    assert exit_code("report", str(readme)) == 2
    assert "bench:missing" in capsys.readouterr().err
