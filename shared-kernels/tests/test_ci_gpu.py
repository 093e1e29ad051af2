"""The script for GPU machines, run against a pretended torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_kernels

SCRIPT = Path(shared_kernels.__file__).parents[3] / ".ci" / "gpu"
TORCH = """
__version__ = "9.9"
class cuda:
    is_available = staticmethod(lambda: {available})
    get_device_name = staticmethod(lambda: "A GPU")
"""
PASSING = "import pytest\n@pytest.mark.gpu\ndef test_runs():\n    pass\n"
SKIPPED = "import pytest\n@pytest.mark.gpu\ndef test_skips():\n    pytest.skip('no reason')\n"
FAILING = "import pytest\n@pytest.mark.gpu\ndef test_fails():\n    assert False\n"
UNMARKED = "def test_elsewhere():\n    assert False\n"
BROKEN = "import no_such_module\nimport pytest\n@pytest.mark.gpu\ndef test_never():\n    pass\n"
OUR_FAULT = PASSING + "import shared_kernels.no_such_module\n"
SYNTAX = PASSING + "def\n"
SETUP = (
    "import pytest\n@pytest.fixture\ndef broken():\n    import no_such_module\n"
    "@pytest.mark.gpu\ndef test_it(broken):\n    pass\n"
)
STRICT = """
import os, pytest
@pytest.mark.gpu
def test_environment():
    assert os.environ["SHARED_KERNELS_STRICT"] == "1"
    assert "TRITON_INTERPRET" not in os.environ
    import shared_kernels
"""

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the whole checkout")


def gpu(folder, *arguments, available=True, **env):
    fake = folder / "fake" / "torch.py"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(TORCH.format(available=available))
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(fake.parent)} | env
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False
    )


def write_tests(folder, **files):
    paths = []
    for name, text in files.items():
        path = folder / f"test_{name}.py"
        path.write_text(text)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("arguments", [["smoke"], ["test"], ["bench", "file.py"]])
def test_without_a_gpu_it_says_so_and_fails(tmp_path, arguments):
    run = gpu(tmp_path, *arguments, available=False)
    assert run.returncode == 1
    assert "no CUDA device: torch 9.9" in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["frob"], ["bench"], ["smoke", "x"]])
def test_bad_use_prints_the_usage(tmp_path, arguments):
    run = gpu(tmp_path, *arguments)
    assert run.returncode == 2
    assert "usage: .ci/gpu smoke" in run.stderr


def test_passing_tests_are_counted(tmp_path):
    paths = write_tests(tmp_path, one=PASSING, two=PASSING, three=SKIPPED, four=UNMARKED)
    run = gpu(tmp_path, "test", *paths)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 gpu tests ran, 0 failed, 0 in error, 1 skipped" in run.stdout


def test_files_that_need_an_absent_library_are_left_out(tmp_path):
    paths = write_tests(tmp_path, one=PASSING, two=BROKEN)
    run = gpu(tmp_path, "test", *paths)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 gpu tests ran, 0 failed, 0 in error, 0 skipped" in run.stdout
    assert "test_two.py: no_such_module is not on this machine" in run.stdout


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"one": SKIPPED}, "no gpu test ran"),
        ({"one": UNMARKED}, "no gpu test ran"),
        ({"one": BROKEN}, "no gpu test ran"),
        ({"one": PASSING, "two": FAILING}, ""),
        ({"one": PASSING, "two": OUR_FAULT}, ""),
        ({"one": PASSING, "two": SYNTAX}, ""),
        ({"one": PASSING, "two": SETUP}, ""),
        ({"one": PASSING, "two": BROKEN, "three": OUR_FAULT}, ""),
    ],
)
def test_what_proves_nothing_fails(tmp_path, files, message):
    run = gpu(tmp_path, "test", *write_tests(tmp_path, **files))
    assert run.returncode != 0
    assert message in run.stderr


def test_tests_run_strictly_on_the_checkout(tmp_path):
    paths = write_tests(tmp_path, one=STRICT)
    run = gpu(tmp_path, "test", *paths, TRITON_INTERPRET="1", SHARED_KERNELS_STRICT="0")
    assert run.returncode == 0, run.stdout + run.stderr
