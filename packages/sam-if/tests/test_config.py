"""Options of a run, and the radius that schedules make of them."""

import dataclasses
import math
import pickle

import pytest
from sam_if.config import SAMConfig
from shared_kernels.testing.imports import assert_does_not_load


def test_it_loads_no_torch():
    assert_does_not_load("from sam_if.config import SAMConfig; SAMConfig()", {"torch", "numpy"})


def test_it_is_a_value():
    config = SAMConfig(rho=1, adaptive=True)
    assert (config.rho, config.norm_eps) == (1.0, 1e-12)
    assert isinstance(config.rho, float)
    assert config == pickle.loads(pickle.dumps(config))
    assert config == SAMConfig(**dataclasses.asdict(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rho = 2.0
    with pytest.raises(TypeError):
        SAMConfig(0.05)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]),
        ("lr", [0.5, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_schedules(schedule, wanted):
    config = SAMConfig(rho_schedule=schedule)
    found = [config.rho_factor(t / 4, lr_ratio=0.5) for t in range(5)]
    assert found == pytest.approx(wanted, abs=1e-15)
    # training that goes on behind its last step
    assert config.rho_factor(1.5, lr_ratio=0.5) == pytest.approx(wanted[-1], abs=1e-15)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rho": -0.1}, ValueError, "SAMConfig.rho: expected a number of at least 0, got -0.1"),
        ({"rho": math.inf}, ValueError, "got inf; 0.05 is usual, and 0.5 to 2 with adaptive"),
        ({"rho": math.nan}, ValueError, "SAMConfig.rho"),
        ({"rho": "0.05"}, TypeError, "got '0.05'"),
        ({"rho": True}, TypeError, "SAMConfig.rho"),
        ({"norm_eps": -1e-12}, ValueError, "SAMConfig.norm_eps"),
        ({"adaptive": 1}, TypeError, "SAMConfig.adaptive: expected true or false, got 1"),
        ({"perturb_decay": "no"}, TypeError, "SAMConfig.perturb_decay"),
        ({"scope": "rank"}, ValueError, "'global', 'per_rank', 'per_microbatch', got 'rank'"),
        ({"bn": "never"}, ValueError, "SAMConfig.bn: expected one of 'first', 'both', 'frozen'"),
        ({"rho_schedule": "step"}, ValueError, "'constant', 'linear', 'cosine', 'lr'"),
        ({"rho_schedule": []}, ValueError, "SAMConfig.rho_schedule"),
        ({"scope": "per_microbatch", "perturb_decay": True}, ValueError, "scope='global'"),
    ],
)  # fmt: skip
def test_bad_options(options, error, words):
    with pytest.raises(error) as caught:
        SAMConfig(**options)
    assert words in str(caught.value)
