import infsampling
import pytest
from shared_kernels.testing.imports import assert_does_not_load

BAD = {"torch", "triton", "transformers", "accelerate", "numpy"}


def test_loads_nothing_heavy():
    assert_does_not_load("import infsampling", BAD)


def test_every_public_name_loads():
    for name in infsampling.__all__:
        assert getattr(infsampling, name) is not None, name
    with pytest.raises(AttributeError):
        _ = infsampling.nothing
