import subprocess
import sys

import pytest
import sam_if
from shared_kernels.testing.imports import assert_does_not_load

BAD = {"torch", "triton", "transformers", "numpy", "safetensors", "scipy"}


def test_loads_nothing_heavy():
    assert_does_not_load("import sam_if", BAD)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="numpy"):
        assert_does_not_load("import sam_if; sam_if.SAM", BAD)


def test_every_public_name_loads():
    for name in sam_if.__all__:
        assert getattr(sam_if, name) is not None, name


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_what_trainers_need_is_said(missing):
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\nimport sam_if\nsam_if.SAM\n"
        "try:\n    sam_if.SAMTrainer\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'sam-if[trainer]'" in done.stdout, done.stderr
