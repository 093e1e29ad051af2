import forelen
import pytest
from shared_kernels.testing.imports import assert_does_not_load

BAD = {"torch", "triton", "transformers", "accelerate", "numpy"}


def test_loads_nothing_heavy():
    assert_does_not_load("import forelen", BAD)


def test_every_public_name_loads():
    for name in forelen.__all__:
        assert getattr(forelen, name) is not None, name
    with pytest.raises(AttributeError):
        _ = forelen.nothing
