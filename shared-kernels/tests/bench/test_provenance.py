import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch
from shared_kernels.bench import describe_run
from shared_kernels.bench import provenance as module
from shared_kernels.bench.provenance import checkout_root, command_line, commit_of


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    return tmp_path


def test_commit_and_dirty_flag(repository):
    commit, dirty = commit_of(repository)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    assert dirty is False
    (repository / "untracked").write_text("new")
    assert commit_of(repository) == (commit, False)
    (repository / "file").write_text("two")
    assert commit_of(repository) == (commit, True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("abc123", ("abc123", False)), ("abc123-dirty", ("abc123", True)), ("", (None, None))],
)
def test_commit_from_the_environment_without_a_repository(tmp_path, monkeypatch, given, expected):
    monkeypatch.setenv("TENFOLD_COMMIT", given)
    assert commit_of(tmp_path) == expected


def test_commit_from_the_environment_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TENFOLD_COMMIT", "abc123")
    assert commit_of(repository) == ("abc123", False)


def test_the_environment_speaks_before_a_repository(repository, monkeypatch):
    (repository / "file").write_text("changed")
    monkeypatch.setenv("TENFOLD_COMMIT", "abc123")
    assert commit_of(repository) == ("abc123", False)


def test_what_a_run_says_about_itself(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = json.loads(json.dumps(describe_run("python -m x")))
    assert made["command"] == "python -m x"
    assert made["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert made["versions"]["python"] == platform.python_version()
    assert made["flags"]["OMP_NUM_THREADS"] == "1"
    assert made["cpu"]["torch_threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["date"])
    assert len(made["load_average"]) == 3
    assert (made["gpu"] is None) == (not torch.cuda.is_available())


def test_a_run_names_neither_host_nor_folder():
    text = json.dumps(describe_run("python -m x"))
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert private not in text.split('"')


def test_missing_libraries_are_listed_as_missing(monkeypatch):
    monkeypatch.setattr(module, "_DISTRIBUTIONS", ("no-such-distribution",))
    assert module.versions()["no-such-distribution"] is None


def test_the_command_gives_files_relative_to_the_checkout(tmp_path):
    (tmp_path / "uv.lock").touch()
    file = tmp_path / "benchmarks" / "step.py"
    file.parent.mkdir()
    file.touch()
    assert checkout_root(file) == tmp_path
    line = command_line("shared_kernels.bench", [str(file), "--only", "noise/*"], tmp_path)
    assert line == "python -m shared_kernels.bench benchmarks/step.py --only noise/*"
