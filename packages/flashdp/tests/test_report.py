"""The report: JSON and back, plain words, warnings."""

import json
import math

import pytest
from flashdp.accounting import Mechanism
from flashdp.report import JSON_NAME, MARKDOWN_NAME, Covered, PrivacyReport

COVERED = (
    Covered(parameter="model.layers.0.mlp.up_proj.weight", rule="linear", group="layer 0", size=64),
    Covered(parameter="model.norm.weight", rule="norm", group="norm", size=8),
)


def report(**changes):
    fields = {
        "epsilon": 7.98,
        "delta": 1e-6,
        "history": ((Mechanism(noise_multiplier=0.7, sample_rate=0.01), 1000),),
        "max_grad_norm": 1.0,
        "thresholds": {"layer 0": 0.8, "norm": 0.6},
        "grouping": "module",
        "clipping": "abadi",
        "noise_allocation": "global",
        "expected_batch_size": 256.0,
        "accountant": "pld",
        "accountant_version": "dp-accounting 0.6.0",
        "rng": "ChaCha20, keyed from the operating system",
        "secure_rng": True,
        "coverage": COVERED,
        "public_n": 25_600,
        "independence": "loss",
    }
    return PrivacyReport(**{**fields, **changes})


@pytest.mark.parametrize(
    "made",
    [
        report(),
        report(epsilon=math.inf, history=((Mechanism(noise_multiplier=0, sample_rate=0.1), 5),)),
        report(user_level=True, public_n=None, audit_lower_bound=0.4, notes=("a remark",)),
        report(coverage=(), thresholds={}),
    ],
)
def test_round_trip(made, tmp_path):
    assert made.save(tmp_path / "run") == tmp_path / "run" / JSON_NAME
    assert PrivacyReport.load(tmp_path / "run") == made
    assert PrivacyReport.load(tmp_path / "run" / JSON_NAME) == made
    text = (tmp_path / "run" / JSON_NAME).read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (tmp_path / "run" / MARKDOWN_NAME).read_text(encoding="utf-8") == made.to_markdown()
    # Nothing half-written stays behind.
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [JSON_NAME, MARKDOWN_NAME]


def test_says_everything_in_plain_words():
    text = report().to_markdown()
    for words in (
        "ε = 7.98",
        "δ = 1e-06",
        "one row of the training data",
        "adding or removing",
        "Poisson",
        "0.01",
        "1000",
        "0.7",
        "256",
        "dp-accounting 0.6.0",
        "ChaCha20",
        "model.layers.0.mlp.up_proj.weight",
        "linear",
        "0.8",
        "hyper-parameter",
        "evaluation",
        "losses",
    ):
        assert words in text, words
    assert "one user" in report(user_level=True).to_markdown()
    truncated = Mechanism(
        noise_multiplier=1,
        sample_rate=0.1,
        sampling="truncated",
        dataset_size=100,
        truncated_batch_size=20,
    )
    assert "at most 20" in report(history=((truncated, 3),)).to_markdown()


def test_names_with_markdown_characters_stay_in_their_cells():
    odd = Covered(parameter="a|b\n`c`", rule="linear", group="g", size=1)
    table = [
        line for line in report(coverage=(odd,)).to_markdown().splitlines() if "linear" in line
    ]
    assert len(table) == 1
    assert table[0].replace("\\|", "").count("|") == 5


def test_the_unit_and_relation_follow_from_what_was_done():
    assert report().neighbouring.startswith("adding or removing one row")
    shuffled = Mechanism(noise_multiplier=1, sample_rate=1, sampling="every_step")
    relation = report(history=((shuffled, 3),)).neighbouring
    assert "left out" in relation
    assert "batches" in relation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 1 / 25_600}, "delta"),
        ({"epsilon": math.inf}, "no privacy"),
        ({"history": ((Mechanism(noise_multiplier=0, sample_rate=0.1), 1),)}, "no noise"),
        ({"secure_rng": False, "rng": "Philox, seed 3"}, "not cryptographic"),
        ({"epsilon": 12.0}, "epsilon"),
        (
            {
                "history": (
                    (Mechanism(noise_multiplier=1, sample_rate=1, sampling="every_step"), 1),
                )
            },
            "no amplification",
        ),
        ({"public_n": None}, "public number of units"),
        ({"coverage": ()}, "coverage"),
        ({"audit_lower_bound": 9.0}, "above epsilon"),
    ],
)
def test_warnings(changes, words):
    assert not any(words in warning for warning in report().warnings)
    made = report(**changes)
    assert any(words in warning for warning in made.warnings), made.warnings
    assert all(warning in made.to_markdown() for warning in made.warnings)
    assert made.to_dict()["warnings"] == list(made.warnings)


def test_an_honest_run_has_no_warnings():
    assert report().warnings == ()
    assert "Warnings" not in report().to_markdown()


def test_a_killed_write_leaves_the_old_report(tmp_path, monkeypatch):
    report().save(tmp_path)
    before = (tmp_path / JSON_NAME).read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report(epsilon=1.0).save(tmp_path)
    assert (tmp_path / JSON_NAME).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON_NAME, MARKDOWN_NAME]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"epsilon": -1.0}, ValueError, "epsilon: .*-1.0"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"delta": 0.0}, ValueError, "delta"),
        ({"delta": "1e-6"}, TypeError, "delta"),
    ],
)
def test_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        report(**changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a report"),
        ('{"version": 9}', "version 1.*9"),
        ('{"version": 1, "epsilon": 1.0}', "delta"),
        ('{"version": 1, "colour": 1}', "colour"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, words):
    (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(ValueError, match=rf"(?s){JSON_NAME}.*{words}"):
        PrivacyReport.load(tmp_path)


def test_a_folder_without_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=JSON_NAME):
        PrivacyReport.load(tmp_path)
