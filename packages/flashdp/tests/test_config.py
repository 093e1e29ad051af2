import json
import pickle

import pytest
from flashdp.config import PrivacyArguments

GOOD = {"target_epsilon": 8.0, "target_delta": 1e-6, "expected_batch_size": 256}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"target_epsilon": 0}, ValueError, r"target_epsilon: expected .* got 0; "),
        ({"target_epsilon": float("inf")}, ValueError, "target_epsilon"),
        ({"target_epsilon": "8"}, TypeError, "target_epsilon: .*'8'"),
        ({"target_epsilon": None}, ValueError, "exactly one of target_epsilon and noise_mult"),
        ({"noise_multiplier": 1.0}, ValueError, "exactly one of .*8.0.*1.0"),
        ({"target_epsilon": None, "noise_multiplier": -1.0}, ValueError, "got -1.0"),
        ({"target_delta": None}, ValueError, "target_delta: expected .* target_epsilon"),
        ({"target_delta": 0.0}, ValueError, "target_delta"),
        ({"target_delta": 1}, ValueError, "target_delta: .*got 1; .*fewer than one unit"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": True}, TypeError, "max_grad_norm: .*True"),
        ({"expected_batch_size": 0}, ValueError, "expected_batch_size"),
        ({"expected_batch_size": float("nan")}, ValueError, "expected_batch_size"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate"),
        ({"sample_rate": 1.5}, ValueError, "sample_rate"),
        ({"grouping": "layer"}, ValueError, "'param', 'module', 'block', 'flat'.*'layer'"),
        ({"clipping": "none"}, ValueError, "clipping: .*'none'"),
        ({"stability": 0.0}, ValueError, "stability"),
        ({"noise_allocation": "best"}, ValueError, "noise_allocation"),
        ({"thresholds": "learnt"}, ValueError, "thresholds"),
        ({"quantile": 1.0}, ValueError, "quantile"),
        ({"eta": 0.0}, ValueError, "eta"),
        ({"share": 1.0}, ValueError, "share"),
        ({"accountant": "prv"}, ValueError, "'pld', 'rdp'.*'prv'"),
        ({"adjacency": "replace_one"}, ValueError, "adjacency: .*'replace_one'"),
        ({"max_physical_batch_size": 0}, ValueError, "max_physical_batch_size"),
        ({"max_physical_batch_size": 8.0}, TypeError, "max_physical_batch_size"),
        ({"max_batch_size": 255}, ValueError, "max_batch_size: .*256, got 255"),
        ({"secure_rng": 1}, TypeError, "secure_rng"),
        ({"check_independence": 1}, TypeError, "check_independence"),
        ({"seed": 3}, ValueError, "seed: .*got 3; .*secure_rng=False"),
        ({"secure_rng": False}, ValueError, "seed: .*got None"),
        ({"secure_rng": False, "seed": -1}, ValueError, "seed"),
        ({"secure_rng": False, "seed": 2**64}, ValueError, "seed"),
        ({"secure_rng": False, "seed": 1.0}, TypeError, "seed"),
        ({"unit_ids_key": ""}, ValueError, "unit_ids_key"),
        ({"unit_ids_key": 3}, TypeError, "unit_ids_key"),
        ({"max_rows_per_unit": 4}, ValueError, "max_rows_per_unit: .*unit_ids_key"),
        ({"unit_ids_key": "user", "max_rows_per_unit": 0}, ValueError, "max_rows_per_unit"),
        ({"thresholds": "adaptive", "clipping": "automatic"}, ValueError, "thresholds: .*abadi"),
    ],
)
def test_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        PrivacyArguments(**{**GOOD, **changes})


def test_defaults_are_the_papers():
    args = PrivacyArguments(**GOOD)
    assert (args.grouping, args.clipping, args.noise_allocation) == ("module", "abadi", "global")
    assert (args.thresholds, args.accountant, args.secure_rng) == ("fixed", "pld", True)
    assert args.max_grad_norm == 1.0


def test_whole_numbers_are_taken_for_real_ones():
    args = PrivacyArguments(**{**GOOD, "target_epsilon": 8, "max_grad_norm": 2})
    assert isinstance(args.target_epsilon, float)
    assert isinstance(args.max_grad_norm, float)


def test_sigma_zero_needs_no_delta():
    args = PrivacyArguments(noise_multiplier=0, expected_batch_size=4)
    assert args.noise_multiplier == 0.0
    assert args.target_delta is None


@pytest.mark.parametrize(
    "args",
    [
        PrivacyArguments(**GOOD),
        PrivacyArguments(
            noise_multiplier=0.7,
            target_delta=1e-5,
            expected_batch_size=12.5,
            sample_rate=0.01,
            thresholds="adaptive",
            secure_rng=False,
            seed=2**64 - 1,
            unit_ids_key="user",
            max_rows_per_unit=4,
            max_batch_size=20,
        ),
    ],
)
def test_round_trip_through_json_and_pickle(args):
    assert PrivacyArguments.from_dict(json.loads(json.dumps(args.to_dict()))) == args
    assert pickle.loads(pickle.dumps(args)) == args


def test_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no option 'max_grad_nrm' \(did you mean 'max_grad_n"):
        PrivacyArguments.from_dict({**GOOD, "max_grad_nrm": 1.0})
    with pytest.raises(TypeError, match="expected a mapping"):
        PrivacyArguments.from_dict([1])


def test_frozen_keyword_only_and_checked_again_when_replaced():
    args = PrivacyArguments(**GOOD)
    with pytest.raises(AttributeError):
        args.seed = 1
    with pytest.raises(TypeError):
        PrivacyArguments(8.0)
    assert args.replace(grouping="flat").grouping == "flat"
    with pytest.raises(ValueError, match="grouping"):
        args.replace(grouping="all")
