"""The ``slimmoe`` command line: measures, plans, compresses and checks.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed, 2 bad input. No command loads torch before it runs.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - cyclopts reads it
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

from slimmoe.commands.evaluation import evaluate
from slimmoe.commands.training import cache_teacher, distill, progressive
from slimmoe.configuration import CompressionConfig

if TYPE_CHECKING:
    from collections.abc import Generator

    from slimmoe.planning import CompressionPlan

app = App(
    name="slimmoe",
    help="Make a mixture-of-experts model smaller; what comes out loads in plain transformers.",
    version=lambda: _version(),
    help_format="plaintext",
)

app.command(cache_teacher)
app.command(distill)
app.command(progressive)
app.command(evaluate, name="eval")

Options = Annotated[CompressionConfig, Parameter(name="*")]
Dequantize = Annotated[bool, Parameter(negative="")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@app.command
def inspect(model: str, *, dequantize: Dequantize = False, json_output: JsonFlag = False) -> int:
    """Say what a model is made of, and whether it can be compressed.

    Names and shapes of its tensors are read, and nothing else. The exit status is 1 if it cannot.

    Args:
        model: Folder or name on the Hugging Face Hub.
        dequantize: Take a model in FP8 or MXFP4 for one in bfloat16.
        json_output: Print JSON.
    """
    from slimmoe.compression import fetched
    from slimmoe.errors import UnsupportedModelError
    from slimmoe.summary import sizes
    from slimmoe.weights import Source

    try:
        source = Source(fetched(model), dequantize=dequantize)
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
    dequantize: Dequantize = False,
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
        dequantize: Read a model in FP8 or MXFP4 as bfloat16.
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
        dequantize=dequantize,
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
    minimum_tokens: int = 32,
    dequantize: Dequantize = False,
    json_output: JsonFlag = False,
) -> int:
    """Decide what is kept and what is averaged, and write it down as JSON.

    Args:
        model: Folder or name on the Hugging Face Hub.
        options: Sizes and methods.
        out: File to write the plan to.
        statistics: Folder of `slimmoe calibrate`.
        minimum_tokens: That an expert should have been selected for; a warning names others.
        dequantize: Read a model in FP8 or MXFP4 as bfloat16.
        json_output: Print JSON.
    """
    from slimmoe.calibration import CalibrationStatistics
    from slimmoe.compression import fetched
    from slimmoe.planning import plan as make_plan
    from slimmoe.summary import compared
    from slimmoe.weights import Source

    source = Source(fetched(model), dequantize=dequantize)
    found = None if statistics is None else CalibrationStatistics.from_pretrained(statistics)
    with _unlogged():
        made = make_plan(source, found, options, minimum_tokens=minimum_tokens)
    made.save(out)
    return _told(compared(source, made), made, json_output, f"plan in {out}")


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
    minimum_tokens: int = 32,
    dequantize: Dequantize = False,
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
        minimum_tokens: That an expert should have been selected for; a warning names others.
        dequantize: Read a model in FP8 or MXFP4 as bfloat16; that alone is work enough, too.
        resume: Whether to go on with what was begun.
        json_output: Print JSON.
    """
    from slimmoe.calibration import CalibrationStatistics
    from slimmoe.compression import compress as run
    from slimmoe.compression import fetched
    from slimmoe.datafiles import read_data
    from slimmoe.planning import CompressionPlan
    from slimmoe.summary import compared
    from slimmoe.weights import Source

    if plan is not None and options != CompressionConfig():
        raise ValueError("--plan: it has the sizes; give it without other sizes and methods")
    if plan is None and options == CompressionConfig() and not dequantize:
        raise ValueError("compress: nothing is made smaller; give a size such as --num-experts")
    known = None if statistics is None else CalibrationStatistics.from_pretrained(statistics)
    with _unlogged():
        made = run(
            model, out, None if plan is not None else options,
            calibration=None if data is None else read_data(data), statistics=known,
            plan=None if plan is None else CompressionPlan.load(plan),
            max_shard_bytes=round(max_shard_gib * (1 << 30)), resume=resume,
            minimum_tokens=minimum_tokens, dequantize=dequantize,
        )  # fmt: skip
    source = Source(fetched(model), dequantize=dequantize)
    return _told(compared(source, made), made, json_output, f"model in {out}")


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


def _rows(told: dict[str, int]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(name, value)) for name, value in told.items()]


def _shown(name: str, value: int) -> str:
    from shared_kernels.units import format_bytes

    return format_bytes(value) if "bytes" in name else f"{value:,}"


@contextmanager
def _unlogged() -> Generator[None]:
    """Keep warnings of a plan, which are printed with it, from being logged, too."""
    log = logging.getLogger("slimmoe.planning")
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


def _told(
    sizes: dict[str, dict[str, int]], made: CompressionPlan, json_output: bool, where: str
) -> int:
    if json_output:
        return print_json({**sizes, "report": made.report, "warnings": made.warnings})
    rows = [
        (name.replace("_", " "), _shown(name, before), _shown(name, sizes["after"][name]))
        for name, before in sizes["before"].items()
    ]
    print_table(rows, ("", "before", "after"))
    for field, form, words in (
        ("dropped_selections", ".1%", "of selections went to experts that are not kept, by layer"),
        ("dropped_mass", ".1%", "of the router's probability was theirs, by layer"),
        ("least_tokens", ",.0f", "tokens went to the least selected expert of a layer"),
    ):
        found = [told[field] for told in made.report.values() if field in told]
        if found:
            print(f"{min(found):{form}} to {max(found):{form}} {words}")
    for told in made.warnings:
        print(f"warning: {told}")
    print(where)
    return 0


def _version() -> str:
    from slimmoe._version import __version__

    return __version__


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return run_app(app, argv)
