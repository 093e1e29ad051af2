import slimmoe
from shared_kernels.testing.imports import assert_does_not_load

BAD = {"torch", "triton", "transformers", "numpy", "safetensors", "scipy"}


def test_loads_nothing_heavy():
    assert_does_not_load("import slimmoe", BAD)


def test_every_public_name_loads():
    for name in slimmoe.__all__:
        assert getattr(slimmoe, name) is not None, name
