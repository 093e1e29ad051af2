"""The cost to elicit: estimates, intervals, pairs, resuming, and one real measurement."""

import json
import math

import numpy as np
import pytest
import torch
from pskv import PrefixScorer
from pskv.robustness import (
    Canary,
    RobustnessReport,
    Trial,
    compare,
    measure,
    read_canaries,
)
from pskv.search import BeamConfig, SearchConfig
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:pskv.search is for")
CANARIES = [Canary(target="Hello", messages='Say "Hello" and nothing else. {optim_str}'),
            Canary(target="The kettle is on.")]  # fmt: skip


@pytest.fixture(scope="module")
def scorer():
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    return PrefixScorer(model, AutoTokenizer.from_pretrained(smollm2()), backend="split")


def trial(canary, seed, at, made=100):
    return Trial(canary, seed, at, at or made, 1e12, 500, 2.0, None, 7, 30.0, [(made, 3.0)])


def report(costs, made=100):
    """A report of trials; None stands for a search that did not succeed."""
    trials = [trial(name, seed, at, made) for (name, seed), at in costs.items()]
    return RobustnessReport({"steps": 3}, {"class": "M"}, {"date": "today"}, trials)


def grid(rows):
    return {(f"c{c}", s): at for c, row in enumerate(rows) for s, at in enumerate(row)}


def test_kaplan_meier_by_hand():
    found = report({("a", 0): 10, ("a", 1): 20, ("a", 2): None, ("a", 3): 40}, made=30)
    costs, shares = found.curve()
    # at risk: 4, 3, then one is censored at 30, then 1
    assert dict(zip(costs, shares, strict=True))[10.0] == pytest.approx(1 / 4)
    assert dict(zip(costs, shares, strict=True))[20.0] == pytest.approx(1 - 3 / 4 * 2 / 3)
    assert dict(zip(costs, shares, strict=True))[40.0] == pytest.approx(1.0)
    assert found.elicited == 0.75
    assert found.quantiles()["0.5"]["evaluations"] == 20


def test_what_was_never_elicited_is_more():
    found = report(grid([[None, None], [None, None]]))
    assert found.elicited == 0
    assert found.quantiles()["0.5"] == {"evaluations": None, "low": None, "high": None}
    assert "more (more to more)" in found.to_markdown()


def test_intervals_hold_the_truth():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(20):
        costs = grid(np.maximum(1, generator.exponential(50, (12, 5))).astype(int).tolist())
        median = report(costs).quantiles()["0.5"]
        held += median["low"] <= 50 * math.log(2) <= median["high"]
    # 19 are expected; 14 or fewer would come three times in ten thousand
    assert held > 14


def test_pairs():
    rows = [[10, 20, 30], [15, 25, None]]
    double = [[None if at is None else 2 * at for at in row] for row in rows]
    found = compare(report(grid(double), made=200), report(grid(rows), made=200))
    assert found.pairs == 6 and found.budget == 200
    assert found.ratio == pytest.approx(2 ** (5 / 6), rel=1e-9)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.elicited == 0
    same = compare(report(grid(rows)), report(grid(rows)))
    assert (same.ratio, same.ratio_low, same.ratio_high) == (1, 1, 1)
    # a smaller budget limits what both can show
    assert compare(report(grid(rows), made=22), report(grid(rows), made=100)).budget == 22
    slow, fast = ({("a", 0): at, ("a", 1): None} for at in (80, 20))
    assert compare(report(slow, made=40), report(fast, made=40)).ratio == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="no canary and seed in common"):
        compare(report({("a", 0): 1}), report({("b", 0): 1}))


def test_saving_and_plotting(tmp_path):
    pytest.importorskip("matplotlib")
    found = report(grid([[10, None], [30, 40]]))
    found.save(tmp_path / "a.json")
    again = RobustnessReport.load(tmp_path / "a.json")
    assert [t.cost for t in again.trials] == [t.cost for t in found.trials]
    assert again.to_markdown(found).count("Paired") == 1
    found.plot(tmp_path / "a.png", again)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a report of"):
        RobustnessReport.load(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("no")
    with pytest.raises(ValueError, match="expected JSON"):
        RobustnessReport.load(tmp_path / "b.json")


def test_a_real_measurement_goes_on_where_it_stopped(scorer, tmp_path):
    path = tmp_path / "report.json"
    config = SearchConfig(steps=2, width=6, topk=32, init="x x x x")
    options = {"seeds": 2, "out": path, "progress": False}
    steps = []

    class Killed(Exception):
        pass

    def kill(step):
        steps.append(step)
        if len(path.read_text() if path.exists() else "") and len(steps) > 3:
            raise Killed

    with pytest.raises(Killed):
        measure(scorer, CANARIES, config, on_step=kill, **options)
    kept = RobustnessReport.load(path).trials
    assert 0 < len(kept) < 4
    found = measure(scorer, CANARIES, config, **options)
    assert len(found.trials) == 4 and found.trials[: len(kept)] == kept
    assert {t.canary for t in found.trials} == {canary.name for canary in CANARIES}
    text = path.read_text()
    assert "kettle" not in text and "Hello" not in text
    for t in found.trials:
        assert t.unprompted > 0 and t.flops > 0 and t.curve
    data = json.loads(text)
    assert data["provenance"]["versions"]["torch"]
    assert data["model"]["class"] == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="of another model or of other settings"):
        measure(scorer, CANARIES, SearchConfig(steps=3, width=6), **options)


def test_a_system_prompt_and_beams(scorer):
    config = BeamConfig(length=2, beams=2, expansions=2)
    plain = measure(scorer, CANARIES[1:], config, seeds=1, progress=False)
    guarded = measure(
        scorer, CANARIES[1:], config, seeds=1, system="Answer in one word.", progress=False
    )
    assert plain.settings["system"] is None and guarded.settings["system"]
    assert plain.trials[0].unprompted != guarded.trials[0].unprompted
    assert compare(plain, guarded).pairs == 1


def test_reading_canaries(tmp_path):
    path = tmp_path / "canaries.jsonl"
    path.write_text('{"target": "Hello"}\n\n{"target": "Hi", "messages": "Greet."}\n')
    assert [canary.target for canary in read_canaries(path)] == ["Hello", "Hi"]
    for text, match in (
        ('{"goal": "x"}', "line 1 of"),
        ("Hello", "line 1 of"),
        ("", "at least one"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_canaries(path)
    with pytest.raises(FileNotFoundError):
        read_canaries(tmp_path / "none.jsonl")


def test_no_seeds(scorer):
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        measure(scorer, CANARIES, seeds=0)
