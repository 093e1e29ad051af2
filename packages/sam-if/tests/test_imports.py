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
