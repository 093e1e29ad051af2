"""Stages: their sizes, their rates of learning, and going on."""

import dataclasses
import sys
from pathlib import Path

import pytest
from slimmoe import CompressionConfig, ProgressiveRunner, ProgressiveSchedule, sizes
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
