"""The study of the paper's findings: its arithmetic, and all of its steps in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import slimmoe
import torch
from safetensors.numpy import save_file

BENCHMARKS = Path(slimmoe.__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the checkout")

if BENCHMARKS.is_dir():
    sys.path.insert(0, str(BENCHMARKS))
    from findings import corpus, data, model, report
    from findings.arms import ARMS, BASE


def written(folder, arm, seed, losses, **numbers):
    """Write what a run would."""
    record = {"arm": arm, "seed": seed, "loss": float(np.mean(losses)), "curve": [[10, 3.0]]}
    (folder / f"{arm}-{seed}.json").write_text(json.dumps(record | numbers))
    save_file({"losses": np.asarray(losses, "f4"), "first": np.asarray(losses, "f4") + 1},
              folder / f"{arm}-{seed}.safetensors")  # fmt: skip


def test_a_difference_is_that_of_paired_runs(tmp_path):
    """What seeds and blocks have in common is not in it; seeds that one lacks are left out."""
    draws = np.random.default_rng(0)
    blocks = draws.normal(3, 1, 400)
    for seed in range(3):
        own = blocks + draws.normal() + draws.normal(0, 0.01, 400)
        written(tmp_path, "base", seed, own - 0.05 + 0.01 * seed)
        written(tmp_path, "random", seed, own)
    written(tmp_path, "base", 3, blocks)
    runs = report.Runs(tmp_path)
    assert runs.seeds("base", "random") == [0, 1, 2]
    (row,) = report.findings(runs)
    assert row.finding == "F1"
    assert row.seeds == pytest.approx([-0.05, -0.04, -0.03], abs=1e-6)
    assert row.value == pytest.approx(-0.04, abs=1e-6)
    # seeds differ by 0.01, blocks not at all
    assert row.low == pytest.approx(-0.05, abs=2e-3)
    assert row.high == pytest.approx(-0.03, abs=2e-3)
    half = 4.302652729911275 * 0.01 / 3**0.5
    assert (row.t_low, row.t_high) == pytest.approx((-0.04 - half, -0.04 + half), abs=1e-5)
    assert "| F1 | pruned and distilled - random and distilled | loss | 3 | -0.0400 |" in (
        report.markdown([row])
    )


def test_an_interval_knows_of_blocks(tmp_path):
    """With seeds that agree it is that of the mean over blocks."""
    draws = np.random.default_rng(0)
    paired = draws.normal(0.1, 1, 500)
    for seed in range(2):
        written(tmp_path, "base", seed, paired)
        written(tmp_path, "no-mtp", seed, np.zeros(500))
    (row,) = report.findings(report.Runs(tmp_path))
    assert (row.high - row.low) / 2 == pytest.approx(1.96 * paired.std() / 500**0.5, rel=0.06)


def test_one_seed_has_no_interval_over_seeds(tmp_path):
    for arm in ("base", "random"):
        written(tmp_path, arm, 0, [1.0, 2.0])
    (row,) = report.findings(report.Runs(tmp_path))
    assert row.t_low is row.t_high is None
    assert "| 1 | +0.0000 | +0.0000 to +0.0000 | - |" in report.markdown([row])


def test_marks_of_a_readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- findings -->\nold\n<!-- /findings -->\nb\n")
    told = {"findings": [], "teachers": {}, "means": {"base": {"runs": 2, "loss": 1.5}},
            "environments": {}}  # fmt: skip
    report.fill(path, told)
    said = path.read_text()
    assert "old" not in said
    assert said.startswith("a\n<!-- findings -->\n| finding ")
    assert "| base | 2 | - | 1.5000 |" in said
    assert said.endswith("<!-- /findings -->\nb\n")
    path.write_text("nothing")
    with pytest.raises(ValueError, match="expected <!-- findings -->"):
        report.fill(path, told)


def test_spread_of_nine(tmp_path):
    names = [report._name(i, m) for i in report._IMPORTANCES for m in report._METHODS]
    assert len(set(names)) == 9
    assert set(names) <= set(ARMS)
    for seed in range(2):
        for number, name in enumerate(names):
            written(tmp_path, name, seed, np.full(10, 2 + 0.1 * number))
    rows = {row.compared: row for row in report.findings(report.Runs(tmp_path))
            if row.finding == "F2"}  # fmt: skip
    assert len(rows) == 2
    for row in rows.values():
        assert row.value == pytest.approx(0.8, abs=1e-5)
        assert row.low == pytest.approx(0.8, abs=1e-5)


def test_a_curve_that_is_reached(tmp_path):
    written(tmp_path, "random", 0, [1.0], curve=[[50, 4.0], [100, 3.0]])
    written(tmp_path, "base", 0, [1.0], curve=[[25, 3.5], [50, 2.9], [100, 2.0]])
    written(tmp_path, "random", 1, [1.0], curve=[[100, 1.0]])
    written(tmp_path, "base", 1, [1.0], curve=[[100, 2.0]])
    found = report.tokens_to_reach(report.Runs(tmp_path), "base", "random")
    assert found == {"0": 0.5, "1": float("inf")}


def test_every_arm_changes_something():
    assert len(set(ARMS.values())) == len(ARMS)
    assert ARMS["base"] == BASE


def test_the_table_of_the_runs_that_came_along():
    """It is printed again from their records, and the README has it."""
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / "findings"), "table"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    told = json.loads((BENCHMARKS / "results" / "findings.json").read_text(encoding="utf-8"))
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    assert ran.stdout.strip() in readme
    assert report.shown(told) in readme


def test_text_of_pages_and_dictionaries(tmp_path):
    page = "<html><head><title>x</title></head><body><nav>menu</nav><p>Some  words\nhere.</p>"
    parser = corpus._Text()
    parser.feed(page + "<pre>a\n  b</pre><script>no()</script></body>")
    assert "".join(parser.parts).split("\n") == ["", "Some words here.", "", "a", "  b", ""]
    assert corpus._manual('.TH X\n.B bold\n\\fIit\\fP a\\-b\n.\\" no') == "X\nbold\nit a-b"
    line = "a line that comes in many files, such as a licence"
    seen = set()
    assert line in corpus._without_repetitions(f"{line}\nown", seen)
    assert corpus._without_repetitions(f"{line}\nown", seen) == "own"
    parts = corpus._parts("y" * 100 + "\n" + "x" * 50_000)
    assert "".join(parts).count("x") == 50_000
    assert all(len(part) <= 40_000 for part in parts)


def test_masters_are_what_is_stepped():
    """Steps that are smaller than bfloat16 can hold add up."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(4))
    optimizers = [
        model.MasterAdamW([{"params": [weight]}, {"params": []}], lr=1e-4, weight_decay=0.0),
        torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0),
    ]
    for _ in range(100):
        for parameter, optimizer in zip((weight, plain), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            assert parameter.grad is None
    assert plain[0].item() == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(weight, plain.bfloat16())


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path):
    """Of the standard library's sources: a teacher, two ways to a student, and F1's direction."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:120]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    documents = [
        corpus.Document("code", "stdlib", text[at : at + 6000])
        for text in texts
        for at in range(0, len(text), 6000)
    ]
    work = tmp_path / "work"
    data.prepare(documents, work / "data", sample=1_000_000)
    loaded = data.load(work / "data")
    assert loaded.train.shape[1] == data.BLOCK
    assert not set(map(tuple, loaded.test.tolist())) & set(map(tuple, loaded.train.tolist()))
    assert loaded.questions["code"]
    assert all(len(q["answers"]) == 4 for q in loaded.questions["code"])
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    target = {"num_layers": 2, "hidden_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
    common = ["--work", str(work), "--device", "cpu"]
    for command in (
        ["teacher", *common, "--tokens", "100000", "--batch", "8", "--sizes", json.dumps(sizes)],
        ["ask-teacher", *common],
        ["students", *common, "--arms", "base,random", "--seeds", "2", "--tokens", "24576",
         "--batch", "8", "--calibration", "8", "--target", json.dumps(target)],
    ):  # fmt: skip
        subprocess.run(
            [sys.executable, str(BENCHMARKS / "findings"), *command], check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    told = report.record(work / "runs")
    (first,) = [row for row in told["findings"] if row["finding"] == "F1"]
    assert first["value"] < 0
    assert told["means"]["base"]["runs"] == 2
    assert told["teachers"]["teacher-0"]["loss"] < np.log(data.VOCABULARY)
    assert not (work / "runs" / "students" / "base-0").exists()
