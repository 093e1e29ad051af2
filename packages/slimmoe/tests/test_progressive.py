"""Stages: their sizes, their rates of learning, and going on."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from slimmoe import CompressionConfig, ProgressiveRunner, ProgressiveSchedule, sizes
from slimmoe.calibration import CalibrationStatistics
from slimmoe.calibration.data import hash_sequences
from slimmoe.cli import main
from slimmoe.distillation import DistillationTrainer
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import model, tokens
from test_distillation import options, rows, trainer_of

#: Qwen3-Next-80B-A3B, and what the paper makes of it.
LARGE = dataclasses.replace(sizes(model("qwen3_next")), layers=48, hidden_size=2048, experts=512)
TARGET = CompressionConfig(num_layers=36, hidden_size=1536, num_experts=256)


@pytest.mark.parametrize(("name", "layers", "hidden"), [
    ("depth_first", [42, 36], [None, 1536]), ("width_first", [None, 36], [1792, 1536]),
    ("joint", [42, 36], [1792, 1536]),
])  # fmt: skip
def test_stages_of_the_paper(name, layers, hidden):
    found = ProgressiveSchedule.make(name, LARGE, TARGET, (40, 360))
    assert [stage.options.num_layers for stage in found.stages] == layers
    assert [stage.options.hidden_size for stage in found.stages] == hidden
    # experts in the first
    assert [stage.options.num_experts for stage in found.stages] == [256, 256]
    assert [stage.span for stage in found.stages] == [(0, 0.1), (0.1, 1)]
    assert [stage.tokens for stage in found.stages] == [40, 360]


def test_stages_keep_to_patterns_of_layers():
    found = ProgressiveSchedule.make("depth_first", LARGE, TARGET, (40, 360), period=4)
    assert found.stages[0].options.num_layers == 40
    small = dataclasses.replace(LARGE, hidden_size=32)
    target = CompressionConfig(hidden_size=16)
    found = ProgressiveSchedule.make("width_first", small, target, (1, 1))
    assert found.stages[0].options.hidden_size == 24
    one = ProgressiveSchedule.make("one_shot", LARGE, TARGET, (400,))
    assert [stage.options for stage in one.stages] == [TARGET]


def test_schedules_that_there_are_not():
    for args, match in (
        (("magic", LARGE, TARGET, (1, 1)), "name: expected one of"),
        (("joint", LARGE, TARGET, (1,)), "tokens: expected 2 numbers"),
        (("one_shot", LARGE, TARGET, (0,)), "tokens: expected 1 numbers"),
        (("joint", LARGE, CompressionConfig(drop_layers=(1,)), (1, 1)), "no drop_layers"),
        (("depth_first", LARGE, CompressionConfig(hidden_size=1536), (1, 1)), "nothing of it"),
    ):
        with pytest.raises(ValueError, match=match):
            ProgressiveSchedule.make(*args)


def rates(folder, **changes):
    found = trainer_of(
        folder, lr_scheduler_type="cosine_with_min_lr", learning_rate=1e-3, warmup_steps=2,
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, **changes,
    )  # fmt: skip
    found.train()
    return [told["learning_rate"] for told in found.state.log_history if "learning_rate" in told]


def test_the_rate_of_learning_goes_on(tmp_path):
    """Two stages have the rates of one run, and the second does not warm up again."""
    whole = rates(tmp_path / "whole", max_steps=16)
    first = rates(tmp_path / "first", max_steps=4, schedule_span=(0.0, 0.25))
    second = rates(tmp_path / "second", max_steps=12, schedule_span=(0.25, 1.0))
    assert first + second == pytest.approx(whole)
    found = trainer_of(tmp_path, max_steps=4, schedule_span=(0.0, 0.5))
    found.args.lr_scheduler_type = "reduce_lr_on_plateau"
    found.create_optimizer()
    with pytest.raises(ValueError, match="lr_scheduler_type: expected a schedule"):
        found.create_scheduler(4)


def test_stages_are_carried_out_and_gone_on_with(tmp_path):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "teacher")
    ids = tokens(before, 12, 9)
    target = CompressionConfig(num_layers=2, hidden_size=16, num_experts=4)
    schedule = ProgressiveSchedule.make("depth_first", sizes(before), target, (2, 4))
    seen = []

    def train(student, stage, folder):
        seen.append((student, stage.span))
        if len(seen) == 2:
            raise KeyboardInterrupt
        found = DistillationTrainer(
            student, tmp_path / "teacher",
            options(folder, max_steps=stage.tokens, schedule_span=stage.span),
            train_dataset=rows(ids),
        )  # fmt: skip
        found.train()
        found.save_model(str(folder / "final"))

    runner = ProgressiveRunner(schedule, train)
    run = {"folder": tmp_path / "stages", "calibration": ids, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        runner.run(tmp_path / "teacher", **run)
    last = runner.run(tmp_path / "teacher", **run)
    assert [span for _, span in seen] == [(0, 1 / 3), (1 / 3, 1), (1 / 3, 1)]
    assert last == tmp_path / "stages" / "stage-2" / "run" / "final"
    found = sizes(last)
    assert (found.layers, found.hidden_size, found.experts) == (2, 16, 4)
    middle = sizes(tmp_path / "stages" / "stage-1" / "run" / "final")
    assert (middle.layers, middle.hidden_size, middle.experts) == (3, 32, 4)
    AutoModelForCausalLM.from_pretrained(last)
    # all is done
    assert runner.run(tmp_path / "teacher", **run) == last
    assert len(seen) == 3
    other = ProgressiveSchedule.make("joint", sizes(before), target, (2, 4))
    with pytest.raises(ValueError, match="folder: expected one of this schedule"):
        ProgressiveRunner(other, train).run(tmp_path / "teacher", **run)


def test_a_stage_that_leaves_nothing(tmp_path):
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "teacher")
    schedule = ProgressiveSchedule.make(
        "one_shot", sizes(before), CompressionConfig(num_layers=2), (2,)
    )
    runner = ProgressiveRunner(schedule, lambda student, stage, folder: None)
    with pytest.raises(ValueError, match="train: expected a folder"):
        runner.run(tmp_path / "teacher", tmp_path / "stages", tokens(before), progress=False)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """A model, 48 sequences, and what runs stages of them: 3 and 6 steps of 4 sequences."""
    before = model("qwen3_moe")
    before.save_pretrained(tmp_path / "source")
    lines = [json.dumps({"input_ids": ids}) for ids in tokens(before, 48, 9).tolist()]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    def run(folder, *flags, table=False, **changes):
        options = {
            "out": folder, "schedule": "depth_first", "tokens": (100, 216), "num_layers": 2,
            "hidden_size": 16, "num_experts": 4, "batch_size": 2, "accumulation": 2,
            "learning_rate": 1e-2, "warmup_steps": 2, "save_steps": 2, "logging_steps": 1,
        } | changes  # fmt: skip
        args = ["progressive", tmp_path / "source", tmp_path / "data.jsonl", *flags]
        args += [] if table else ["--json"]
        for name, value in options.items():
            args += [f"--{name}".replace("_", "-")]
            args += value if isinstance(value, tuple) else [value]
        return main([str(arg) for arg in args])

    return run


def logged(folder, stage, name):
    """What was logged of each step of a stage."""
    steps = {1: 3, 2: 6}[stage]
    state = folder / f"stage-{stage}" / "run" / f"checkpoint-{steps}" / "trainer_state.json"
    return [told[name] for told in json.loads(state.read_text())["log_history"] if name in told]


def test_stages_have_one_rate_of_learning(command, tmp_path, capsys):
    assert command(tmp_path / "run") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(tmp_path / "run" / "stage-2" / "run" / "final")
    assert [stage["steps"] for stage in told["stages"]] == [3, 6]
    assert [stage["tokens"] for stage in told["stages"]] == [108, 216]
    assert [(stage["layers"], stage["hidden_size"], stage["experts"])
            for stage in told["stages"]] == [(3, 32, 4), (2, 16, 4)]  # fmt: skip
    last = sizes(told["out"])
    assert (last.layers, last.hidden_size, last.experts) == (2, 16, 4)
    AutoModelForCausalLM.from_pretrained(told["out"])
    found = [logged(tmp_path / "run", stage, "learning_rate") for stage in (1, 2)]

    def rate(step):
        # two steps of warming up, and then a cosine to 3/40 over the seven that are left
        if step < 2:
            return 1e-2 * step / 2
        share = (1 + math.cos(math.pi * (step - 2) / 7)) / 2
        return 1e-2 * (3 / 40 + (1 - 3 / 40) * share)

    # a line has the rate of its own step, or that which comes next
    both = found[0] + found[1]
    assert any(both == pytest.approx([rate(step + more) for step in range(9)]) for more in (0, 1))
    assert found[1][0] < found[0][-1]
    assert told["stages"][1]["learning_rate"] == found[1][-1]
    # weights of losses go on, too
    shares = [logged(tmp_path / "run", stage, "kd_weight") for stage in (1, 2)]
    wanted = [1 - 0.25 * step / 9 for step in range(1, 10)]
    assert shares[0] + shares[1] == pytest.approx(wanted)


@pytest.mark.parametrize("killed", ["stage-1", "stage-2"])
def test_stages_that_were_stopped_go_on(killed, command, tmp_path, monkeypatch, capsys):
    """With the same bits as those that were not, wherever it was."""
    assert command(tmp_path / "whole") == 0
    wanted = capsys.readouterr().out
    steps, plain = [], DistillationTrainer.training_step

    def step(self, *args, **options):
        here = Path(self.args.output_dir).parent.name
        steps.append(here)
        # the third step of two batches, behind a checkpoint
        if here == killed and steps.count(here) == 5:
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    def counted(self, *args, **options):
        steps.append("more")
        return plain(self, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "training_step", step)
    # cyclopts makes an exit of it
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        command(tmp_path / "again")
    assert (tmp_path / "again" / "stage-1" / "done").is_file() == (killed == "stage-2")
    capsys.readouterr()
    steps[:] = ["done before"]
    monkeypatch.setattr(DistillationTrainer, "training_step", counted)
    assert command(tmp_path / "again") == 0
    # from the checkpoint behind the second step on
    assert len(steps) == 1 + {"stage-1": 2 + 12, "stage-2": 8}[killed]
    assert capsys.readouterr().out.replace("again", "whole") == wanted
    places = [tmp_path / name / "stage-2" / "run" / "final" for name in ("whole", "again")]
    states = [AutoModelForCausalLM.from_pretrained(place).state_dict() for place in places]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_stages_see_texts_of_their_own(command, tmp_path, monkeypatch):
    """Where there are enough: 12 sequences, and the 24 behind them."""
    seen, plain = {}, DistillationTrainer.training_step

    def step(self, model, inputs, *args, **options):
        here = Path(self.args.output_dir).parent.name
        seen.setdefault(here, []).extend(map(tuple, inputs["input_ids"].tolist()))
        return plain(self, model, inputs, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "training_step", step)
    assert command(tmp_path / "run", calibration_sequences=7) == 0
    rows = [tuple(json.loads(line)["input_ids"])
            for line in (tmp_path / "data.jsonl").read_text().splitlines()]  # fmt: skip
    assert sorted(seen["stage-1"]) == sorted(rows[:12])
    assert sorted(seen["stage-2"]) == sorted(rows[12:36])
    # calibration sees some of all of them
    statistics = CalibrationStatistics.from_pretrained(tmp_path / "run" / "stage-2" / "statistics")
    assert statistics.sequences == 7
    wanted = hash_sequences([torch.tensor(row) for row in rows[:42:6]])
    assert statistics.tokens_sha256 == wanted


def test_stages_for_people(command, tmp_path, capsys):
    """What is there is told as a table; the teacher may be on disk."""
    folder, data = tmp_path / "source", tmp_path / "data.jsonl"
    args = ["cache-teacher", folder, data, "--out", tmp_path / "cache", "--tokens", 8]
    assert main([str(arg) for arg in args]) == 0
    assert command(tmp_path / "run", cache=tmp_path / "cache") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert command(tmp_path / "run", table=True, cache=tmp_path / "cache") == 0
    out = capsys.readouterr().out
    assert "stage 2" in out
    assert f"model in {told['out']}" in out


def test_other_stages_do_not_go_on(command, tmp_path, capsys):
    one = {"schedule": "one_shot", "tokens": (30,), "logging_steps": 10}
    assert command(tmp_path / "run", **one) == 0
    # a line of the log is told, though it has fewer steps than are between two
    assert {"lm", "kl", "learning_rate"} <= json.loads(capsys.readouterr().out)["stages"][0].keys()
    for changes, match in (
        ({"learning_rate": 1e-3}, "learning_rate: expected 0.01, as it was begun, got float 0.001"),
        ({"calibration_sequences": 7}, "calibration_sequences: expected 1024, as it was begun"),
        ({"num_experts": 6}, "folder: expected one of this schedule"),
        ({"schedule": "joint"}, "tokens: expected 2 numbers"),
    ):
        capsys.readouterr()
        assert command(tmp_path / "run", **one | changes) == 2
        assert match in capsys.readouterr().err
    assert command(tmp_path / "run", "--no-resume", **one | {"learning_rate": 1e-3}) == 0
