"""The study of utility: its facts, its runs, and what it shows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import flashdp
import pytest
import torch

BENCHMARKS = Path(flashdp.__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the checkout")

if BENCHMARKS.is_dir():
    sys.path.insert(0, str(BENCHMARKS))
    import utility
    from utility import ARMS, ORDINARY, Outcome, Run, Study

    TINY = Study(
        units=60, held_out=6, batch=6, steps=2, rank=2, epsilons=(3.0, 8.0), rates=(1e-2,),
        codes=1, repeats=(1, 3), candidates=8, clip=1e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small model and a tokenizer of characters."""
    from shared_kernels.testing.models import tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = ["<eos>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: k for k, c in enumerate(letters)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    tiny_model("llama", vocab_size=len(letters)).save_pretrained(folder)
    return str(folder)


def test_facts_are_repeatable_and_hold_the_codes():
    study = Study(units=500, held_out=20)
    facts = utility.make_facts(study)
    assert facts == utility.make_facts(study)
    assert (len(facts.train), len(facts.validation), len(facts.test)) == (500, 20, 20)
    for repeats, planted in facts.codes.items():
        for name, code in planted:
            assert facts.train.count(utility.door_code(name, code)) == repeats
    assert not any("code" in text for text in facts.validation + facts.test)


def test_a_study_runs_resumes_and_is_shown(model, tmp_path, monkeypatch):
    # Calibration has tests of its own, and takes seconds.
    monkeypatch.setattr(utility, "noise_of", lambda study, epsilon: 4 / epsilon if epsilon else 0)
    path = tmp_path / "utility.json"
    outcomes = utility.run_study(model, "cpu", TINY, path, jobs=1)
    assert len(outcomes) == 2 * len(ARMS) + 1
    # Private runs differ from each other, and a smaller epsilon takes more noise.
    assert len({o.test for o in outcomes}) == len(outcomes)
    for arm in ARMS:
        low, high = (utility.best(outcomes, arm, e).sigma for e in TINY.epsilons)
        assert low > high > 0
    text = utility.table(path)
    assert all(f"| {arm} |" in text for arm in (*ARMS, ORDINARY))
    assert utility.render("a\n<!-- utility -->\nold\n<!-- /utility -->\nb", path) == (
        f"a\n<!-- utility -->\n{text}\n<!-- /utility -->\nb"
    )
    # What is there is not run again; another study is not mixed in.
    before = path.read_bytes()
    utility.run_study("nowhere", "cpu", TINY, path, jobs=1)
    assert path.read_bytes() == before
    with pytest.raises(SystemExit, match="another study"):
        utility.run_study(model, "cpu", replace(TINY, steps=3), path, jobs=1)


def test_training_lowers_the_loss_and_raises_the_exposure(model):
    study = replace(TINY, steps=60, batch=20, repeats=(1, 30), candidates=64)
    start = utility.train(model, "cpu", replace(study, steps=1), Run(ORDINARY, None, 0.0), 0.0)
    end = utility.train(model, "cpu", study, Run(ORDINARY, None, 0.05), 0.0)
    assert end.test < start.test - 0.1
    assert all(torch.tensor(v).isfinite() and 0 <= v <= 6 for v in end.exposure.values())


def test_rates_are_chosen_before_the_rest_runs():
    first = utility.to_do(TINY, [])
    assert {run.epsilon for run in first} == {3.0, None}
    done = [Outcome(run, 1.0, 2.0, 2.0, {}, 1.0) for run in first]
    rest = utility.to_do(TINY, done)
    assert {run.arm for run in rest} == set(ARMS)
    assert {run.epsilon for run in rest} == {8.0}


def test_the_readme_shows_what_was_found():
    text = utility.README.read_text(encoding="utf-8")
    if utility.RESULT.is_file():
        assert utility.render(text) == text
