"""`.ci/lock`: a lock without addresses, and a check that can fail."""

import importlib.util
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FILLED = """\
version = 1
revision = 5
requires-python = ">=3.11"

[[package]]
name = "zo2"
version = "0.1.0"
source = { editable = "packages/zo2" }
dependencies = [
    { name = "torch" },
]

[[package]]
name = "torch"
version = "2.15.0"
source = { registry = "https://download.example.org/simple" }
sdist = { url = "https://files.example.org/ab/cd/torch-2.15.0.tar.gz", hash = "sha256:aa", size = 7, upload-time = "2026-01-01T00:00:00Z" }
wheels = [
    { url = "https://files.example.org/ab/torch-2.15.0%2Bcpu-cp311-none-any.whl?x=1#y", hash = "sha256:bb", size = 12 },
    { url = "file:///srv/index/torch-2.15.0-cp312-none-any.whl", hash = "sha256:cc" },
    { path = "/srv/index/torch-2.15.0-cp313-none-any.whl", hash = "sha256:dd" },
]
"""  # noqa: E501

NEUTRAL = """\
version = 1
revision = 5
requires-python = ">=3.10"

[[package]]
name = "zo2"
version = "0.1.0"
source = { editable = "packages/zo2" }
dependencies = [
    { name = "torch" },
]

[[package]]
name = "torch"
version = "2.15.0"
source = { registry = "pypi" }
sdist = { path = "torch-2.15.0.tar.gz", hash = "sha256:aa" }
wheels = [
    { path = "torch-2.15.0+cpu-cp311-none-any.whl", hash = "sha256:bb" },
    { path = "torch-2.15.0-cp312-none-any.whl", hash = "sha256:cc" },
    { path = "torch-2.15.0-cp313-none-any.whl", hash = "sha256:dd" },
]
"""


@pytest.fixture(scope="module")
def lock():
    loader = SourceFileLoader("ci_lock", str(ROOT / ".ci" / "lock"))
    spec = importlib.util.spec_from_loader("ci_lock", loader)
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def test_every_address_is_stripped_and_pins_names_and_hashes_stay(lock):
    assert lock.neutral(FILLED, 11) == NEUTRAL


def test_stripping_twice_changes_nothing(lock):
    assert lock.neutral(NEUTRAL, 11) == NEUTRAL


def test_a_local_index_given_as_a_path_is_stripped(lock):
    text = FILLED.replace("https://download.example.org/simple", "../../srv/index")
    assert lock.neutral(text, 11) == NEUTRAL


def test_an_address_that_no_registry_replaces_is_refused(lock):
    text = FILLED + 'source = { git = "https://git.example.org/a?rev=b#c" }\n'
    with pytest.raises(lock.LockError, match=r"git\.example\.org"):
        lock.neutral(text, 11)


@pytest.mark.parametrize("text", ["", 'requires-python = ">=3.12"\n'])
def test_something_that_is_not_this_workspace_lock_is_refused(lock, text):
    with pytest.raises(lock.LockError, match=r">=3\.11"):
        lock.neutral(text, 11)


def test_differences_show_a_changed_pin(lock):
    lines = lock.differences(NEUTRAL, NEUTRAL.replace('"2.15.0"', '"2.16.0"'))
    assert '-version = "2.15.0"' in lines
    assert '+version = "2.16.0"' in lines


def test_differences_show_a_changed_dependency(lock):
    changed = NEUTRAL.replace('    { name = "torch" },\n', "")
    assert '-    { name = "torch" },' in lock.differences(NEUTRAL, changed)


def test_differences_show_a_file_with_another_hash(lock):
    (line,) = lock.differences(NEUTRAL, NEUTRAL.replace("sha256:cc", "sha256:ee"))
    assert "torch-2.15.0-cp312-none-any.whl" in line
    assert "sha256:cc" in line
    assert "sha256:ee" in line


def test_a_registry_may_gain_or_lack_files_of_a_pinned_version(lock):
    extra = '    { path = "torch-2.15.0-cp315-none-any.whl", hash = "sha256:ff" },\n]\n'
    assert lock.differences(NEUTRAL, NEUTRAL.removesuffix("]\n") + extra) == []
    sdist = 'sdist = { path = "torch-2.15.0.tar.gz", hash = "sha256:aa" }\n'
    assert lock.differences(NEUTRAL, NEUTRAL.replace(sdist, "")) == []


def test_the_filter_command_is_the_same_stripping():
    done = subprocess.run(
        [sys.executable, ".ci/lock", "neutral", "-"],
        cwd=ROOT,
        input=FILLED,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, NEUTRAL, "")


def test_the_filter_command_refuses_with_exit_code_1():
    command = [sys.executable, ".ci/lock", "neutral", "-"]
    done = subprocess.run(command, cwd=ROOT, input="x = 1\n", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "requires-python" in done.stderr


def test_unknown_commands_exit_with_2():
    done = subprocess.run([sys.executable, ".ci/lock", "bogus"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2


def test_the_working_copy_can_be_made_neutral(lock):
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    assert lock.neutral(text, lock.member_minor())


def test_the_committed_lock_is_neutral(lock):
    shown = subprocess.run(
        ["git", "show", "HEAD:uv.lock"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if shown.returncode:
        pytest.skip("this checkout has no git history with a uv.lock")
    assert "://" not in shown.stdout
    assert lock.neutral(shown.stdout, lock.member_minor()) == shown.stdout
