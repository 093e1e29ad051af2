import pahq
import pytest
from shared_kernels.testing.imports import assert_does_not_load

BAD = {"torch", "triton", "transformers", "numpy", "safetensors"}


def test_loads_nothing_heavy():
    assert_does_not_load("import pahq", BAD)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="numpy"):
        assert_does_not_load("import pahq; pahq.Graph", BAD)


def test_every_public_name_loads():
    for name in pahq.__all__:
        assert getattr(pahq, name) is not None, name
