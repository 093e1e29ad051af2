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
    "trl",
    "opacus",
}


@pytest.mark.parametrize(
    "code",
    [
        "import flashdp",
        "from flashdp import PrivacyArguments, Accountant, Mechanism, PrivacyReport",
        "from flashdp.cli import main; main(['--help'])",
        "from flashdp.cli import main; main(['calibrate', '--help'])",
        "from flashdp.cli import main; main(['epsilon', '--help'])",
        "from flashdp.cli import main; main(['report', '--help'])",
        "from flashdp.cli import main; main(['check', '--help'])",
        "from flashdp.cli import main; main(['plan', '--help'])",
        "from flashdp.cli import main; main(['audit', '--help'])",
        "from flashdp.cli import main; main(['--version'])",
    ],
)
def test_loads_nothing_heavy(code):
    assert_does_not_load(code, BAD)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="torch"):
        assert_does_not_load("import flashdp; flashdp.PoissonDataLoader", BAD)


def test_accounting_loads_no_torch():
    code = """
from flashdp import Accountant, Mechanism, PoissonSampler
Accountant("rdp", Mechanism(noise_multiplier=1, sample_rate=0.1)).step()
PoissonSampler(10, 0.1, 1).draw(0)
"""
    assert_does_not_load(code, {"torch", "transformers", "accelerate"})


def test_every_public_name_loads():
    # DPSFTTrainer needs trl; test_trl.py has it.
    for name in set(flashdp.__all__) - {"DPSFTTrainer"}:
        assert getattr(flashdp, name) is not None, name
    assert set(flashdp.__all__) <= set(dir(flashdp))
