import subprocess
import sys

import pytest
import zo2
from shared_kernels.testing.imports import assert_does_not_load

BAD = {
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numba",
    "scipy",
    "matplotlib",
    "trl",
    "peft",
}


@pytest.mark.parametrize(
    "code",
    [
        "import zo2",
        "from zo2 import ZOConfig, OffloadConfig, TrainConfig, UpdateLog; ZOConfig()",
        "from zo2.cli import main; main(['--help'])",
        "from zo2.cli import main; main(['log', 'verify', '--help'])",
        "from zo2.cli import main; main(['replay', '--help'])",
        "from zo2.cli import main; main(['train', '--help'])",
        "from zo2.cli import main; main(['plan', '--help'])",
        "from zo2.cli import main; main(['bench', 'step', '--help'])",
        "from zo2.cli import main; main(['--version'])",
    ],
)
def test_loads_nothing_heavy(code):
    assert_does_not_load(code, BAD)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="torch"):
        assert_does_not_load("import zo2; zo2.replay", BAD)


def test_method_names_load_no_transformers():
    assert_does_not_load(
        "import zo2; zo2.replay; zo2.prepare; zo2.plan", {"transformers", "trl", "triton"}
    )


def test_every_public_name_loads():
    # ZOSFTTrainer needs trl; test_trl.py has it.
    for name in set(zo2.__all__) - {"ZOSFTTrainer"}:
        assert getattr(zo2, name) is not None, name
    assert set(zo2.__all__) <= set(dir(zo2))


def test_functions_are_not_shadowed_by_modules():
    """Whatever was imported before, a public name means the function."""
    code = """
import importlib, pkgutil, zo2
for module in pkgutil.iter_modules(zo2.__path__):
    if module.name != "__main__":
        importlib.import_module(f"zo2.{module.name}")
assert all(callable(getattr(zo2, n)) for n in zo2.__all__
           if n not in ("reference", "__version__", "ZOSFTTrainer"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
