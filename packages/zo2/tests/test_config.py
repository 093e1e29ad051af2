import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zo2 import OffloadConfig, TrainConfig, ZOConfig, parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        ("1.5KiB", 1536),
        (".5k", 500),
        ("12", 12),
        (0, 0),
        (2**63 - 1, 2**63 - 1),
        (" 3 tib ", 3 * 2**40),
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_parse_bytes_reads_sizes(size, expected):
    assert parse_bytes(size) == expected


def test_every_unit():
    for power, letter in enumerate("kMGT", start=1):
        assert parse_bytes(f"1{letter}") == parse_bytes(f"1{letter}B") == 1000**power
        assert parse_bytes(f"1{letter}iB") == 1024**power


@given(st.integers(0, 2**40))
def test_parse_bytes_inverts_writing(n):
    assert parse_bytes(str(n)) == parse_bytes(f"{n}B") == parse_bytes(n) == n
    assert parse_bytes(f"{n % 10**6} MiB") == n % 10**6 * 2**20


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        ("eight", ValueError, "'eight'"),
        ("8 parsec", ValueError, "unknown unit 'parsec'"),
        ("-1GiB", ValueError, "-1GiB"),
        (-1, ValueError, "-1"),
        ("1e3", ValueError, "1e3"),
        ("9" * 40, ValueError, "2\\*\\*63"),
        ("1" * 10000, ValueError, "memory size"),
        (True, TypeError, "True"),
        (1.5, TypeError, "float"),
        ("", ValueError, "''"),
    ],
)
def test_parse_bytes_names_what_it_refuses(size, error, words):
    with pytest.raises(error, match=words):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"eps": 0.0}, ValueError, r"eps: expected .* got 0.0; MeZO uses 1e-3"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"eps": "1e-3"}, TypeError, "eps"),
        ({"q": 0}, ValueError, "q: .* got 0"),
        ({"q": 4097}, ValueError, "4096"),
        ({"q": True}, TypeError, "q"),
        ({"q": 1.0}, TypeError, "q"),
        ({"dist": "cauchy"}, ValueError, "'gaussian', 'rademacher'.*'cauchy'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size"),
        ({"arithmetic": "fast"}, ValueError, "arithmetic"),
        ({"arithmetic": "mezo", "q": 2}, ValueError, "q=2"),
        ({"arithmetic": "mezo", "dist": "rademacher"}, ValueError, "rademacher"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"clip_g": 0.0}, ValueError, "clip_g"),
        ({"train_mode": 1}, TypeError, "train_mode"),
    ],
)
def test_zo_config_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        ZOConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"gpu": "lots"}, ValueError, "OffloadConfig.gpu: .*'lots'"),
        ({"host": 1.5}, TypeError, "host"),
        ({"store": "int4"}, ValueError, "store: .*'int4'"),
        ({"fold_every": 0}, ValueError, "fold_every"),
        ({"fold_every": "often"}, TypeError, "fold_every"),
        ({"blocks": ()}, ValueError, "blocks"),
        ({"blocks": ""}, ValueError, "blocks"),
        ({"blocks": 3}, TypeError, "blocks"),
        ({"resident": "embed"}, TypeError, "resident"),
        ({"pin": "maybe"}, ValueError, "pin"),
        ({"prefetch": 0}, ValueError, "prefetch"),
    ],
)
def test_offload_config_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        OffloadConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"model": ""}, ValueError, "model"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"steps": 0}, ValueError, "steps"),
        ({"dtype": "float8"}, ValueError, "dtype"),
        ({"trainer": {"learning_rate": 1.0}}, ValueError, "'learning_rate' is set by the option"),
        ({"trainer": []}, TypeError, "trainer"),
        ({"zo": {}}, TypeError, "zo"),
    ],
)
def test_train_config_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        TrainConfig(**{"model": "m", "data": "d.jsonl", **kwargs})


@pytest.mark.parametrize(
    "config",
    [
        ZOConfig(),
        ZOConfig(eps=0.1, q=3, dist="rademacher", clip_g=2, seed=2**64 - 1),
        OffloadConfig(),
        OffloadConfig(gpu="8GiB", host=123, blocks=("a", "b"), resident=("c",), fold_every=4),
        TrainConfig(model="m", data="d", zo=ZOConfig(q=2), trainer={"bf16": True, "x": [1]}),
    ],
)
def test_round_trip_through_json_and_pickle(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no option 'epss' \(did you mean 'eps'\?\)"):
        ZOConfig.from_dict({"epss": 1})
    with pytest.raises(ValueError, match="ZOConfig has no option 'K'"):
        TrainConfig.from_dict({"model": "m", "data": "d", "zo": {"K": 1}})
    with pytest.raises(TypeError, match="expected a mapping"):
        ZOConfig.from_dict([])


def test_configs_are_frozen_and_keyword_only():
    config = ZOConfig()
    with pytest.raises(AttributeError):
        config.eps = 1.0
    with pytest.raises(TypeError):
        ZOConfig(1e-3)
    assert config.replace(q=2).q == 2
    with pytest.raises(ValueError, match="q"):
        config.replace(q=0)
