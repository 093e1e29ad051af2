"""The ``slimmoe`` command line: measures, plans, compresses and checks.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed, 2 bad input. No command loads torch before it runs.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - cyclopts reads it
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

from slimmoe.configuration import CompressionConfig

app = App(
    name="slimmoe",
    help="Make a mixture-of-experts model smaller; what comes out loads in plain transformers.",
    version=lambda: _version(),
    help_format="plaintext",
)

Options = Annotated[CompressionConfig, Parameter(name="*")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@app.command
def inspect(model: str, *, json_output: JsonFlag = False) -> int:
    """Say what a model is made of, and whether it can be compressed.

    Names and shapes of its tensors are read, and nothing else. The exit status is 1 if it cannot.

    Args:
        model: Folder or name on the Hugging Face Hub.
        json_output: Print JSON.
    """
    from slimmoe.compression import fetched
    from slimmoe.errors import UnsupportedModelError
    from slimmoe.summary import sizes
    from slimmoe.weights import Source

    try:
        source = Source(fetched(model))
    except UnsupportedModelError as error:
        if json_output:
            print_json({"model": model, "works": False, "refused": str(error)})
        else:
            print(f"It cannot be compressed: {error}")
        return 1
    told = asdict(sizes(source))
    refused = {
        name: why
        for name, why in (
            ("hidden_size", source.family.no_width),
            ("moe_intermediate_size", source.family.no_neurons),
        )
        if why
    }
    if json_output:
        return print_json({
            "model": model, "works": True, "family": source.family.model_type, **told,
            "layers_with_experts": source.places(), "stay": refused,
        })  # fmt: skip
    rows = [("family", source.family.model_type), *_rows(told)]
    rows += [(f"{name} stays", why) for name, why in refused.items()]
    print_table(rows)
    return 0


@app.command
def calibrate(
    model: str,
    data: Annotated[list[Path], Parameter(consume_multiple=True)],
    *,
    out: Path,
    batch_tokens: int = 16384,
    sequence_length: int = 2048,
    mode: Literal["auto", "resident", "layerwise"] = "auto",
    device: str | None = None,
    dtype: Dtype = "auto",
    scratch: Path | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Run a model on texts once, and write down what compression is planned by.

    Args:
        model: Folder or name on the Hugging Face Hub.
        data: Files of text, of JSON lines with `text` or `input_ids`, or folders of these.
        out: Folder to write the statistics to.
        batch_tokens: Tokens that are run at a time.
        sequence_length: Of texts, which are joined and cut.
        mode: resident loads the whole model; layerwise one layer at a time, from the folder.
        device: Where to run it; by default a GPU if there is one.
        dtype: To run it in; auto takes what the checkpoint has.
        scratch: Folder for hidden states between layers; without one they are in memory.
        json_output: Print JSON.
    """
    import torch

    from slimmoe.calibration import calibrate as run
    from slimmoe.compression import fetched
    from slimmoe.datafiles import read_data

    wanted = None if dtype == "auto" else getattr(torch, dtype)
    found = run(
        fetched(model), read_data(data), batch_tokens=batch_tokens,
        sequence_length=sequence_length, mode=mode, device=device, dtype=wanted, scratch=scratch,
    )  # fmt: skip
    found.save_pretrained(out)
    never = {layer: list(told.never_selected) for layer, told in found.coverage().items()}
    missing = {str(layer): experts for layer, experts in never.items() if experts}
    if json_output:
        return print_json({"out": str(out), "tokens": found.tokens, "never_selected": missing})
    print(f"{found.tokens:,} tokens in {out}")
    for layer, experts in missing.items():
        print(f"layer {layer}: experts {experts} were never selected")
    return 0


@app.command
def plan(
    model: str,
    options: Options = CompressionConfig(),  # noqa: B008
    *,
    out: Path,
    statistics: Path | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Decide what is kept and what is averaged, and write it down as JSON.

    Args:
        model: Folder or name on the Hugging Face Hub.
        options: Sizes and methods.
        out: File to write the plan to.
        statistics: Folder of `slimmoe calibrate`.
        json_output: Print JSON.
    """
    from slimmoe.calibration import CalibrationStatistics
    from slimmoe.compression import fetched
    from slimmoe.planning import plan as make_plan
    from slimmoe.summary import compared
    from slimmoe.weights import Source

    source = Source(fetched(model))
    found = None if statistics is None else CalibrationStatistics.from_pretrained(statistics)
    made = make_plan(source, found, options)
    made.save(out)
    return _told(compared(source, made), made.report, json_output, f"plan in {out}")


@app.command
def compress(
    model: str,
    out: Path,
    options: Options = CompressionConfig(),  # noqa: B008
    *,
    plan: Path | None = None,
    statistics: Path | None = None,
    data: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    max_shard_gib: float = 5.0,
    resume: bool = True,
    json_output: JsonFlag = False,
) -> int:
    """Write a smaller model, shard by shard; one that was stopped goes on.

    Args:
        model: Folder or name on the Hugging Face Hub.
        out: Folder to write it to.
        options: Sizes and methods, without a plan.
        plan: File of `slimmoe plan`.
        statistics: Folder of `slimmoe calibrate`.
        data: Texts to calibrate with, instead of statistics.
        max_shard_gib: GiB of a file of weights.
        resume: Whether to go on with what was begun.
        json_output: Print JSON.
    """
    from slimmoe.calibration import CalibrationStatistics
    from slimmoe.compression import compress as run
    from slimmoe.compression import fetched
    from slimmoe.datafiles import read_data
    from slimmoe.planning import CompressionPlan
    from slimmoe.summary import compared

    if plan is not None and options != CompressionConfig():
        raise ValueError("--plan: it has the sizes; give it without other sizes and methods")
    if plan is None and options == CompressionConfig():
        raise ValueError("compress: nothing is made smaller; give a size such as --num-experts")
    known = None if statistics is None else CalibrationStatistics.from_pretrained(statistics)
    made = run(
        fetched(model), out, None if plan is not None else options,
        calibration=None if data is None else read_data(data), statistics=known,
        plan=None if plan is None else CompressionPlan.load(plan),
        max_shard_bytes=round(max_shard_gib * (1 << 30)), resume=resume,
    )  # fmt: skip
    return _told(compared(fetched(model), made), made.report, json_output, f"model in {out}")


@app.command
def verify(
    folder: Path, *, source: str | None = None, tokens: int = 32, json_output: JsonFlag = False
) -> int:
    """Check what was written: its bytes, names and shapes.

    Args:
        folder: Of `slimmoe compress`.
        source: The model that it was made of, to compare with compression in memory; all of them
            are loaded.
        tokens: Random ones that both are run on.
        json_output: Print JSON.
    """
    from slimmoe.compression import fetched
    from slimmoe.verification import verify as run

    told = run(folder, None if source is None else fetched(source), tokens=tokens)
    if json_output:
        return print_json({"folder": str(folder), **told})
    print_table([(name, f"{value:,}") for name, value in told.items()])
    return 0


@app.command
def cache_teacher(
    teacher: str,
    data: Annotated[list[Path], Parameter(consume_multiple=True)],
    *,
    out: Path,
    tokens: int = 64,
    sampled: bool = False,
    sequence_length: int = 1024,
    temperature: float = 1.0,
    device: str | None = None,
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
        seed: Of drawing.
        json_output: Print JSON.
    """
    import torch

    from slimmoe.compression import fetched
    from slimmoe.distillation import Teacher, TeacherLogitCache

    rows = _sequences(teacher, data, sequence_length)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = Teacher.from_pretrained(fetched(teacher)).to(torch.device(place))
    found = TeacherLogitCache.build(
        out, asked, rows, tokens=tokens, sampled=sampled, temperature=temperature, seed=seed,
    )  # fmt: skip
    if json_output:
        return print_json({"out": str(out), "sequences": len(found), "tokens": tokens})
    print(f"{len(found):,} sequences in {out}")
    return 0


@app.command
def distill(
    student: str,
    teacher: str,
    data: Annotated[list[Path], Parameter(consume_multiple=True)],
    *,
    out: Path,
    steps: int,
    batch_size: int = 8,
    accumulation: int = 1,
    sequence_length: int = 1024,
    learning_rate: float = 4e-4,
    warmup_steps: int = 0,
    kd_weight: tuple[float, float] = (1.0, 0.75),
    mtp_weight: tuple[float, float] = (0.3, 0.1),
    temperature: float = 1.0,
    cache: Path | None = None,
    save_steps: int = 500,
    logging_steps: int = 10,
    seed: int = 0,
    json_output: JsonFlag = False,
) -> int:
    """Train a compressed model on texts and on what its teacher says of them; goes on if stopped.

    The rate of learning falls on a cosine to a thirteenth, as in the paper. The last model is in
    OUT/final, and loads in plain transformers.

    Args:
        student: Folder of `slimmoe compress`, or another model.
        teacher: The model that it was made of.
        data: Files of text, of JSON lines with `text` or `input_ids`, or folders of these.
        out: Folder for checkpoints and the last model.
        steps: Of the optimizer.
        batch_size: Sequences of a batch.
        accumulation: Batches of a step.
        sequence_length: Of texts, which are joined and cut.
        learning_rate: At most.
        warmup_steps: In which it rises.
        kd_weight: Of distillation against the language model's loss, at the begin and at the end.
        mtp_weight: Of modules of multi-token prediction, at the begin and at the end.
        temperature: Of both laws.
        cache: Of `slimmoe cache-teacher` with the same data; the teacher is not loaded then.
        save_steps: Between checkpoints.
        logging_steps: Between lines of the log.
        seed: Of the order of sequences.
        json_output: Print JSON.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from slimmoe.compression import fetched
    from slimmoe.distillation import (
        DistillationArguments,
        DistillationTrainer,
        TeacherLogitCache,
    )

    rows = _sequences(teacher, data, sequence_length)
    args = DistillationArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation, learning_rate=learning_rate,
        warmup_steps=warmup_steps, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 3 / 40}, kd_weight=kd_weight, mtp_weight=mtp_weight,
        temperature=temperature, save_steps=save_steps, logging_steps=logging_steps, seed=seed,
        report_to=[], save_total_limit=2,
    )  # fmt: skip
    known: Any = fetched(teacher) if cache is None else TeacherLogitCache(cache)
    dataset: Any = rows if cache is None else known.attach(rows)
    trainer = DistillationTrainer(fetched(student), known, args, train_dataset=dataset)
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    with redirect_stdout(sys.stderr):
        # Trainer prints its log; results alone are for stdout
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(out / "final"))
    told = next((t for t in reversed(trainer.state.log_history) if "kl" in t), {})
    told = {name: value for name, value in told.items() if isinstance(value, int | float)}
    if json_output:
        return print_json({"out": str(out / "final"), "sequences": len(rows), **told})
    print_table([(name, f"{value:.4g}") for name, value in told.items()])
    print(f"model in {out / 'final'}")
    return 0


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


def _rows(told: dict[str, int]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(name, value)) for name, value in told.items()]


def _shown(name: str, value: int) -> str:
    from shared_kernels.units import format_bytes

    return format_bytes(value) if "bytes" in name else f"{value:,}"


def _told(
    sizes: dict[str, dict[str, int]], report: dict[str, Any], json_output: bool, where: str
) -> int:
    if json_output:
        return print_json({**sizes, "report": report})
    rows = [
        (name.replace("_", " "), _shown(name, before), _shown(name, sizes["after"][name]))
        for name, before in sizes["before"].items()
    ]
    print_table(rows, ("", "before", "after"))
    for field, words in (("dropped_selections", "of selections went to experts that are not kept"),
                         ("dropped_mass", "of the router's probability was theirs")):  # fmt: skip
        shares = [told[field] for told in report.values() if field in told]
        if shares:
            print(f"{min(shares):.1%} to {max(shares):.1%} {words}, by layer")
    print(where)
    return 0


def _version() -> str:
    from slimmoe._version import __version__

    return __version__


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return run_app(app, argv)
