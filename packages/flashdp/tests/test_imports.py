import flashdp
import pytest
from shared_kernels.testing.imports import assert_does_not_load

BAD = {
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "dp_accounting",
    "scipy",
    "peft",
    "opacus",
}


@pytest.mark.parametrize("code", ["import flashdp"])
def test_loads_nothing_heavy(code):
    assert_does_not_load(code, BAD)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="torch"):
        assert_does_not_load("import flashdp, torch", BAD)


def test_every_public_name_loads():
    for name in flashdp.__all__:
        assert getattr(flashdp, name) is not None, name
    assert set(flashdp.__all__) <= set(dir(flashdp))
