"""Commands that train: ``cache-teacher``, ``distill`` and ``progressive``."""

# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from shared_kernels._checks import message
from shared_kernels.console import JsonFlag, print_json, print_table

from slimmoe.configuration import CompressionConfig

if TYPE_CHECKING:
    from slimmoe.progressive import Stage

_Flag = Annotated[bool, Parameter(negative="")]
#: What was logged last, in the folder of a run.
_TOLD = "told.json"


def cache_teacher(
    teacher: str,
    data: Annotated[list[Path], Parameter(consume_multiple=True)],
    *,
    out: Path,
    tokens: int = 64,
    sampled: _Flag = False,
    sequence_length: int = 1024,
    temperature: float = 1.0,
    device: str | None = None,
    dequantize: _Flag = False,
    seed: int = 0,
    json_output: JsonFlag = False,
) -> int:
    """Write down what a teacher says of texts: it need not be there while its student learns.

    A token takes 8 bytes for each of the numbers that are kept of it.

    Args:
        teacher: Folder or name on the Hugging Face Hub.
        data: Files of text, of JSON lines with `text` or `input_ids`, or folders of these.
        out: Folder to write to.
        tokens: Kept of each law: the likeliest, or as many drawn.
        sampled: Draw them: then the gradient is that of the whole law in expectation.
        sequence_length: Of texts, which are joined and cut.
        temperature: Of the law.
        device: Where to run it; by default a GPU if there is one.
        dequantize: Read a teacher in FP8 or MXFP4 as bfloat16.
        seed: Of drawing.
        json_output: Print JSON.
    """
    import torch

    from slimmoe.compression import fetched
    from slimmoe.distillation import Teacher, TeacherLogitCache

    rows = _sequences(teacher, data, sequence_length)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = Teacher.from_pretrained(fetched(teacher), dequantize=dequantize, device=place)
    found = TeacherLogitCache.build(
        out, asked, rows, tokens=tokens, sampled=sampled, temperature=temperature, seed=seed,
    )  # fmt: skip
    if json_output:
        return print_json({"out": str(out), "sequences": len(found), "tokens": tokens})
    print(f"{len(found):,} sequences in {out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained.

    The rate of learning rises, and falls on a cosine to 3/40 of its most, as in the paper.

    Attributes:
        batch_size: Sequences of a batch.
        accumulation: Batches of a step.
        sequence_length: Of texts, which are joined and cut.
        learning_rate: At most.
        warmup_steps: In which it rises.
        kd_weight: Of distillation against the language model's loss, at the begin and at the end.
        mtp_weight: Of modules of multi-token prediction, at the begin and at the end.
        temperature: Of both laws.
        router_aux_loss_coef: Of the loss that evens out the load of experts; by default the
            model's own, and 0 is without.
        balance_ahead: Look through all batches of a step first, so that each is evened out by the
            load of all of them; takes a forward pass more of all but one.
        check_teacher: Stop early where the teacher has another tokenizer, or says less than chance
            of the data.
        save_steps: Between checkpoints.
        logging_steps: Between lines of the log.
        seed: Of the order of sequences.
    """

    batch_size: int = 8
    accumulation: int = 1
    sequence_length: int = 1024
    learning_rate: float = 4e-4
    warmup_steps: int = 0
    kd_weight: tuple[float, float] = (1.0, 0.75)
    mtp_weight: tuple[float, float] = (0.3, 0.1)
    temperature: float = 1.0
    router_aux_loss_coef: float | None = None
    balance_ahead: bool = False
    check_teacher: bool = True
    save_steps: int = 500
    logging_steps: int = 10
    seed: int = 0

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.batch_size * self.accumulation


def distill(
    student: str,
    teacher: str,
    data: Annotated[list[Path], Parameter(consume_multiple=True)],
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),
    *,
    out: Path,
    steps: int,
    cache: Path | None = None,
    offload: _Flag = False,
    dequantize: _Flag = False,
    json_output: JsonFlag = False,
) -> int:
    """Train a compressed model on texts and on what its teacher says of them; goes on if stopped.

    The last model is in OUT/final, and loads in plain transformers.

    Args:
        student: Folder of `slimmoe compress`, or another model.
        teacher: The model that it was made of.
        data: Files of text, of JSON lines with `text` or `input_ids`, or folders of these.
        recipe: How it is trained.
        out: Folder for checkpoints and the last model.
        steps: Of the optimizer.
        cache: Of `slimmoe cache-teacher` with the same data; the teacher is not loaded then.
        offload: Keep the teacher's layers in the host's memory, and copy each while the one before
            it runs.
        dequantize: Read a teacher in FP8 or MXFP4 as bfloat16.
        json_output: Print JSON.
    """
    from slimmoe.compression import fetched

    if cache is not None and dequantize:
        remedy = "a cache needs no teacher"
        raise ValueError(message("dequantize", "no cache beside it", str(cache), remedy))
    rows = _sequences(teacher, data, recipe.sequence_length)
    known, dataset = _teacher(teacher, cache, rows, offload, dequantize)
    told = _train(fetched(student), known, dataset, out, recipe, steps, teacher)
    if json_output:
        return print_json({"out": str(out / "final"), "sequences": len(rows), **told})
    print_table([(name, f"{value:.4g}") for name, value in told.items()])
    print(f"model in {out / 'final'}")
    return 0


def progressive(
    source: str,
    data: Annotated[list[Path], Parameter(consume_multiple=True)],
    options: Annotated[CompressionConfig, Parameter(name="*")] = CompressionConfig(),  # noqa: B008
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),
    *,
    out: Path,
    tokens: Annotated[list[int], Parameter(consume_multiple=True)],
    schedule: Literal["one_shot", "depth_first", "width_first", "joint"] = "depth_first",
    period: int = 1,
    calibration_sequences: int = 1024,
    cache: Path | None = None,
    offload: _Flag = False,
    dequantize: _Flag = False,
    resume: bool = True,
    json_output: JsonFlag = False,
) -> int:
    """Compress and distil in stages, and go on where it was stopped.

    Each stage measures the student that there is, makes it smaller and trains it; the teacher is
    always SOURCE. The rate of learning and the weights of losses go on over all stages. Where there
    are as many sequences, each stage has its own.

    Args:
        source: Folder or name on the Hugging Face Hub.
        data: Files of text, of JSON lines with `text` or `input_ids`, or folders of these.
        options: Sizes at the end, and methods.
        recipe: How stages train; steps of warming up and weights are of all of them together.
        out: Folder for stages; the last model is in OUT/stage-N/run/final.
        tokens: Of each stage, rounded up to whole steps: one number for one_shot, two for others.
        schedule: depth_first drops half of the layers first, width_first half of the channels,
            joint half of both; experts go in the first stage.
        period: Layers that make a pattern: half of what goes is rounded to whole ones.
        calibration_sequences: That each stage measures its student on, spread over the data.
        cache: Of `slimmoe cache-teacher` with the same data; the source teaches through it then.
        offload: Keep the teacher's layers in the host's memory, and copy each while the one before
            it runs.
        dequantize: Read a source in FP8 or MXFP4 as bfloat16.
        resume: Whether to go on with what is in OUT.
        json_output: Print JSON.
    """
    from shared_kernels.files import write_text
    from torch.utils.data import Subset

    from slimmoe.calibration.data import hash_sequences
    from slimmoe.compression import fetched
    from slimmoe.progressive import ProgressiveRunner, ProgressiveSchedule
    from slimmoe.summary import sizes
    from slimmoe.weights import Source

    folder = fetched(source)
    rows = _sequences(source, data, recipe.sequence_length)
    known, dataset = _teacher(source, cache, rows, offload, dequantize)
    step = recipe.sequences * max(len(row["input_ids"]) for row in rows)
    steps = [-(-size // step) for size in tokens]
    made = ProgressiveSchedule.make(
        schedule,
        sizes(Source(folder, dequantize=dequantize)),
        options,
        [step * count for count in steps],
        period=period,
    )
    enough = len(rows) >= sum(steps) * recipe.sequences

    def train(student: Path, stage: Stage, run: Path) -> None:
        number = made.stages.index(stage)
        count, before = steps[number], sum(steps[:number])
        part = dataset
        if enough:
            part = Subset(dataset, range(before * recipe.sequences,
                                         (before + count) * recipe.sequences))  # fmt: skip
        told = _train(student, known, part, run, recipe, count, source, stage.span)
        found = sizes(student)
        write_text(run / _TOLD, json.dumps({
            "layers": found.layers, "hidden_size": found.hidden_size, "experts": found.experts,
            "tokens": stage.tokens, "steps": count, **told,
        }))  # fmt: skip

    ids = [row["input_ids"] for row in rows]
    begun = {
        **asdict(recipe), "source": str(source), "calibration_sequences": calibration_sequences,
        "data": hash_sequences(ids), "cache": None if cache is None else str(cache),
    }  # fmt: skip
    spread = ids[:: max(1, len(ids) // calibration_sequences)][:calibration_sequences]
    with redirect_stdout(sys.stderr):
        last = ProgressiveRunner(made, train, begun).run(
            folder, out, spread, resume=resume,
            base_model=None if Path(source).is_dir() else source, dequantize=dequantize,
        )  # fmt: skip
    told = [json.loads((out / f"stage-{n}" / "run" / _TOLD).read_text(encoding="utf-8"))
            for n in range(1, len(steps) + 1)]  # fmt: skip
    if json_output:
        return print_json({"out": str(last), "stages": told})
    names = dict.fromkeys(name for stage in told for name in stage)
    print_table([(name, *(f"{stage[name]:.4g}" for stage in told)) for name in names],
                ("", *(f"stage {n}" for n in range(1, len(told) + 1))))  # fmt: skip
    print(f"model in {last}")
    return 0


def _teacher(
    teacher: str, cache: Path | None, rows: list[dict[str, Any]], offload: bool, dequantize: bool
) -> tuple[Any, Any]:
    """Return what teaches, and its dataset."""
    from slimmoe.compression import fetched
    from slimmoe.distillation import Teacher, TeacherLogitCache

    if cache is None:
        folder = fetched(teacher)
        return Teacher.from_pretrained(folder, offload=offload, dequantize=dequantize), rows
    if offload:
        remedy = "a cache needs no teacher"
        raise ValueError(message("offload", "no cache beside it", str(cache), remedy))
    known = TeacherLogitCache(cache)
    return known, known.attach(rows)


def _train(
    student: Path, teacher: Any, dataset: Any, out: Path, recipe: Recipe, steps: int, name: str,
    span: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:  # fmt: skip
    """Train in a folder, going on with what is there; return what was logged last."""
    from shared_kernels.checkpoint import copy_side_files
    from transformers.trainer_utils import get_last_checkpoint

    from slimmoe import model_card
    from slimmoe.distillation import DistillationArguments, DistillationTrainer
    from slimmoe.streaming import MANIFEST

    args = DistillationArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation, learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 3 / 40}, kd_weight=recipe.kd_weight,
        mtp_weight=recipe.mtp_weight, temperature=recipe.temperature, schedule_span=span,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        balance_ahead=recipe.balance_ahead, check_teacher=recipe.check_teacher,
        save_steps=recipe.save_steps, logging_steps=min(recipe.logging_steps, steps),
        seed=recipe.seed,
        report_to=[], save_total_limit=2,
    )  # fmt: skip
    trainer = DistillationTrainer(student, teacher, args, train_dataset=dataset)
    last, final = get_last_checkpoint(str(out)) if out.is_dir() else None, out / "final"
    with redirect_stdout(sys.stderr):
        # Trainer prints its log; results alone are for stdout
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(final))
    # a tokenizer and a card; sums of files are of those before
    there = {file.name for file in final.iterdir()} - {model_card.FILE}
    copy_side_files(student, final, skip=[MANIFEST, *there])
    model_card.note_training(
        final,
        f"Distilled from {Path(name).name if Path(name).is_dir() else name} for {steps} steps of "
        f"{recipe.sequences} sequences.",
    )
    told = next((t for t in reversed(trainer.state.log_history) if "lm" in t), {})
    return {name: value for name, value in told.items() if isinstance(value, int | float)}


def _sequences(model: str, data: list[Path], length: int) -> list[dict[str, Any]]:
    """Return rows of token ids, of one length where they are made of texts."""
    from transformers import AutoTokenizer

    from slimmoe.calibration.data import make_sequences
    from slimmoe.datafiles import read_data

    items = read_data(data)
    tokenizer = AutoTokenizer.from_pretrained(model) if isinstance(items[0], str) else None
    found = make_sequences(items, length, tokenizer)
    if tokenizer is not None and len(found) > 1:
        # one that is shorter would need padding
        found = [row for row in found if len(row) == length]
    return [{"input_ids": row} for row in found]
