import pskv
import pytest
from shared_kernels.testing.imports import assert_does_not_load

BAD = {"torch", "triton", "transformers", "accelerate", "numpy"}


def test_loads_nothing_heavy():
    assert_does_not_load("import pskv", BAD)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="torch"):
        assert_does_not_load("import pskv; pskv.plan", BAD)


def test_every_public_name_loads():
    for name in pskv.__all__:
        assert getattr(pskv, name) is not None, name
