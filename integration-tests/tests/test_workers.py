"""The root conftest: which runs are shared out over processes, and where bytecode goes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = """
import os
os.sched_getaffinity = lambda pid: range({cores})
class cuda:
    is_available = staticmethod(lambda: {gpu})
"""
TEST = """
import json, os, pathlib, sys, pytest
@pytest.mark.parametrize("number", range(8))
def test_it(number):
    names = "PYTEST_XDIST_WORKER", "OMP_NUM_THREADS", "PYTHONPYCACHEPREFIX"
    found = {name: os.environ.get(name) for name in names}
    found["writes"] = not sys.dont_write_bytecode
    found["exists"] = os.path.isdir(sys.pycache_prefix or "")
    pathlib.Path("seen", f"{number}.json").write_text(json.dumps(found))
"""


@pytest.fixture
def runs(root, tmp_path):
    """Return a function: run pytest on eight tests under our conftest; what the tests saw."""
    for name in ("fake", "seen", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tmp_path / "tests" / "test_a.py").write_text(TEST)
    shutil.copy(root / "conftest.py", tmp_path)
    clean = {
        name: value
        for name, value in os.environ.items()
        if name != "OMP_NUM_THREADS" and not name.startswith("PYTEST")
    }
    clean["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # starts in half the time

    def run(*arguments, gpu=False, cores=2, **env) -> list[dict]:
        (tmp_path / "fake" / "torch.py").write_text(TORCH.format(cores=cores, gpu=gpu))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", *arguments],
            cwd=tmp_path, env=clean | {"PYTHONPATH": str(tmp_path / "fake")} | env,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        seen = [json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()]
        assert len(seen) == 8
        return seen

    return run


def workers(seen: list[dict]) -> set[str | None]:
    return {found["PYTEST_XDIST_WORKER"] for found in seen}


@pytest.mark.parametrize("arguments", [[], ["tests"], ["-n", "2", "-k", "it"]])
def test_folders_and_what_is_asked_for_are_shared_by_single_threaded_workers(runs, arguments):
    seen = runs(*arguments)
    assert workers(seen) == {"gw0", "gw1"}
    assert {found["OMP_NUM_THREADS"] for found in seen} == {"1"}


def test_the_threads_can_be_chosen(runs):
    assert {found["OMP_NUM_THREADS"] for found in runs(OMP_NUM_THREADS="2")} == {"2"}


def test_there_are_not_more_workers_than_memory_is_for(runs):
    assert workers(runs(cores=64)) == {"gw0", "gw1", "gw2", "gw3"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/test_a.py"],
        ["-k", "it"],
        ["-s"],
        ["--pdb"],
        ["-n", "0"],
        ["-p", "no:xdist"],
    ],
)
def test_a_few_tests_run_in_this_process(runs, arguments):
    seen = runs(*arguments)
    assert workers(seen) == {None}
    assert {found["OMP_NUM_THREADS"] for found in seen} == {None}


def test_a_gpu_is_not_shared(runs):
    assert workers(runs(gpu=True)) == {None}
    assert workers(runs("-n", "2", gpu=True)) == {"gw0", "gw1"}


@pytest.mark.parametrize("arguments", [["-n", "0"], ["-n", "2"]])
def test_unwanted_bytecode_goes_where_it_is_removed(runs, tmp_path, arguments):
    seen = runs(*arguments, PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX="")
    assert all(found["writes"] and found["exists"] for found in seen)
    (folder,) = {found["PYTHONPYCACHEPREFIX"] for found in seen}
    assert folder
    assert not Path(folder).exists()
    assert not list(tmp_path.rglob("__pycache__"))


def test_bytecode_goes_where_the_environment_says(runs, tmp_path):
    folder = tmp_path / "mine"
    seen = runs("-n", "0", PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=str(folder))
    assert {found["PYTHONPYCACHEPREFIX"] for found in seen} == {str(folder)}
    assert folder.is_dir()
