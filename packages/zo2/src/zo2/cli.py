"""The ``zo2`` command line: logs, replay, plans, training, benchmarks.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed or found a fault, 2 bad input. No command loads torch before
it runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from shared_kernels.console import JsonFlag, print_json, print_table, print_wide, run_app

from zo2.config import OffloadConfig, ZOConfig
from zo2.log import FLUSH, SKIPPED, LogError, UpdateLog

app = App(
    name="zo2",
    help="Zeroth-order fine-tuning of models that do not fit the GPU.",
    version=lambda: _version(),
    help_format="plaintext",
)
log_app = App(name="log", help="Look into update logs, check and cut them.")
app.command(log_app)
bench_app = App(name="bench", help="Measure this machine: noise, transfers, a step.")
app.command(bench_app)


@log_app.command
def show(path: Path, *, last: int = 10, json_output: JsonFlag = False) -> int:
    """Print a log's header and its last records.

    Args:
        path: The .zolog file.
        last: Number of records to list.
        json_output: Print JSON.
    """
    with UpdateLog.open(path) as log:
        total = len(log)
        rows = [_record(row) for row in log.read(max(0, total - last), total)]
        header = dict(log.header)
    table = header.pop("parameters", [])
    summary = {
        "path": str(path),
        "records": total,
        "parameters": len(table),
        "elements": sum(_numel(p.get("shape", [])) for p in table),
        **header,
    }
    if json_output:
        return print_json({**summary, "last": rows})
    print_table([(k, _short(v)) for k, v in summary.items()], title=f"{path}")
    columns = ("step", "seed", "lr", "weight_decay", "g", "flags")
    print_table([[_short(row[c]) for c in columns] for row in rows], columns, title="last records")
    return 0


@log_app.command
def verify(path: Path, *, json_output: JsonFlag = False) -> int:
    """Check every record of a log; exit status 1 names the first fault.

    Args:
        path: The .zolog file.
        json_output: Print JSON.
    """
    with UpdateLog.open(path) as log:
        report = log.verify()
    faults = [d.message for d in report.damage]
    if json_output:
        print_json(
            {
                "ok": report.ok,
                "records": report.records,
                "updates": report.updates,
                "usable": report.usable,
                "torn_bytes": report.torn_bytes,
                "damage": [vars(d) for d in report.damage],
            }
        )
    else:
        state = "sound" if report.ok else f"DAMAGED, {report.usable} records are usable"
        print(f"{path}: {report.records} records, {report.updates} updates: {state}")
        for fault in faults:
            print(f"  {fault}")
    return 0 if report.ok else 1


@log_app.command
def truncate(path: Path, records: int, *, json_output: JsonFlag = False) -> int:
    """Keep the first RECORDS records of a log and drop everything after them.

    Args:
        path: The .zolog file.
        records: Records to keep.
        json_output: Print JSON.
    """
    with UpdateLog.open(path, "a", verify=False) as log:
        before = len(log)
        log.truncate(records)
    if json_output:
        return print_json({"path": str(path), "before": before, "records": records})
    print(f"{path}: kept {records} of {before} records")
    return 0


@log_app.command
def diff(first: Path, second: Path, *, json_output: JsonFlag = False) -> int:
    """Compare two logs; exit status 1 if they differ.

    Args:
        first: A .zolog file.
        second: Another.
        json_output: Print JSON.
    """
    with UpdateLog.open(first) as a, UpdateLog.open(second) as b:
        keys = sorted(set(a.header) | set(b.header))
        differing = [k for k in keys if a.header.get(k) != b.header.get(k)]
        lengths = len(a), len(b)
        at = _first_difference(a, b)
    same = not differing and at is None and lengths[0] == lengths[1]
    if json_output:
        print_json({"same": same, "header": differing, "records": lengths, "first_difference": at})
    elif same:
        print(f"the same: {lengths[0]} records")
    else:
        print(f"header keys that differ: {', '.join(differing) or 'none'}")
        where = "none in the common part" if at is None else f"record {at}"
        print(f"records: {lengths[0]} and {lengths[1]}; first difference: {where}")
    return 0 if same else 1


@app.command
def replay(
    base: str,
    log: Path,
    *,
    out: Path,
    upto: int | None = None,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Rebuild a fine-tuned model from its base and its update log, bit for bit.

    Args:
        base: Folder with the base model's safetensors, or its name on the hub.
        log: The .zolog file.
        out: Folder to write; it must not exist, or be empty.
        upto: Apply only the first UPTO updates.
        device: Where to compute, for example "cuda"; default: CUDA if there is any.
        json_output: Print JSON.
    """
    from zo2._replay import replay as run

    folder = run(base, log, upto=upto, device=device, out=out, progress=sys.stderr.isatty())
    if json_output:
        return print_json({"out": str(folder)})
    print(folder)
    return 0


@app.command
def plan(
    model: str,
    *,
    tokens: int,
    batch_size: int = 1,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    q: int = 1,
    micro_batch_size: int | None = None,
    gpu: str | None = None,
    host: str | None = None,
    store: Literal["auto", "fp32", "bf16x2", "bf16"] = "auto",
    fold_every: int | Literal["auto"] = "auto",
    prefetch: int = 2,
    bandwidth: Path | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Predict time and memory of a run; exit status 1 if it does not fit.

    Args:
        model: Folder or name of a model; only its config is read.
        tokens: Tokens of one batch.
        batch_size: Sequences in the batch.
        dtype: Compute dtype; "auto" takes the checkpoint's.
        q: Directions per step.
        micro_batch_size: Sequences per forward; default: the whole batch.
        gpu: GPU budget, for example 8GiB; default: stream every block.
        host: Host memory limit.
        store: How the host keeps weights.
        fold_every: Steps between write-backs of a block.
        prefetch: Blocks uploaded ahead.
        bandwidth: JSON file with the rates of another machine; default: measure this one.
        json_output: Print JSON.
    """
    from zo2._plan import plan as predict

    rates = "measure" if bandwidth is None else json.loads(bandwidth.read_text(encoding="utf-8"))
    found = predict(
        model,
        tokens=tokens,
        batch_size=batch_size,
        dtype=dtype,
        zo=ZOConfig(q=q, micro_batch_size=micro_batch_size),
        offload=OffloadConfig(
            gpu=gpu, host=host, store=store, fold_every=fold_every, prefetch=prefetch
        ),
        bandwidth=rates,
    )
    return _print_plan(found, json_output)


@app.command
def train(
    *,
    config: Path | None = None,
    model: str | None = None,
    data: str | None = None,
    output_dir: str | None = None,
    eval_data: str | None = None,
    lr: float | None = None,
    lr_scheduler: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    resume: Annotated[bool | None, Parameter(negative="")] = None,
    settings: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json_output: JsonFlag = False,
) -> int:
    """Fine-tune a model from a data file; options win over the config file.

    Args:
        config: YAML file with the options below, and blocks zo, offload and trainer.
        model: Folder with a transformers model, or a name of the hub.
        data: Examples: .jsonl, .json or .parquet with text, or prompt and completion, or messages.
        output_dir: Folder for log, checkpoints and the final model (zo2-run).
        eval_data: Held-out examples of the same form.
        lr: Learning rate (1e-6).
        lr_scheduler: Schedule of transformers (constant).
        steps: Steps (1000).
        batch_size: Examples per step (16).
        max_length: Tokens kept of each example (1024).
        dtype: Type the model is loaded in (auto).
        resume: Continue from the last checkpoint in the output folder.
        settings: Any other field of the config, such as zo.eps=1e-2 or offload.gpu=8GiB.
        dry_run: Check data and options and show the plan; train nothing.
        json_output: Print JSON.
    """
    from zo2.train import load_config, plan_run
    from zo2.train import train as run

    options = {
        "model": model,
        "data": data,
        "output_dir": output_dir,
        "eval_data": eval_data,
        "lr": lr,
        "lr_scheduler": lr_scheduler,
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "dtype": dtype,
        "resume": resume,
    }
    chosen = load_config(config, options, settings)
    if dry_run:
        return _print_plan(plan_run(chosen), json_output)
    return _print_result("zo2 train", run(chosen), json_output)


@bench_app.command(name="rng")
def bench_rng(
    *, elements: int = 1 << 24, device: str | None = None, json_output: JsonFlag = False
) -> int:
    """Measure noise: draws per second.

    Args:
        elements: Draws in one call.
        device: Default: CUDA if there is any.
        json_output: Print JSON.
    """
    from zo2 import bench

    return _print_result("noise", bench.rng(elements=elements, device=device), json_output)


@bench_app.command(name="pcie")
def bench_pcie(*, device: str | None = None, json_output: JsonFlag = False) -> int:
    """Measure transfers between host and device, copies and matrix products.

    Args:
        device: Default: CUDA if there is any.
        json_output: Print JSON.
    """
    from zo2 import bench

    return _print_result("rates per second", bench.pcie(device=device), json_output)


@bench_app.command(name="step")
def bench_step(
    model: str,
    *,
    tokens: int,
    gpu: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Time steps of a model with random weights, streamed and resident.

    Args:
        model: Folder or name of a model; only its config is read.
        tokens: Tokens of the batch.
        gpu: GPU budget of the streamed arm; default: stream every block.
        dtype: Compute dtype.
        device: Default: CUDA if there is any.
        json_output: Print JSON.
    """
    from zo2 import bench

    found = bench.step(model, tokens=tokens, gpu=gpu, dtype=dtype, device=device)
    return _print_result("step", found, json_output)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_app(app, argv, bad_input=(LogError,))


def _version() -> str:
    from zo2._version import __version__

    return __version__


def _first_difference(a: UpdateLog, b: UpdateLog) -> int | None:
    if a.dtype != b.dtype:
        return 0
    common = min(len(a), len(b))
    stride = 65536
    for start in range(0, common, stride):
        ours, theirs = a.read(start, start + stride), b.read(start, start + stride)
        for k, (x, y) in enumerate(zip(ours, theirs, strict=False)):
            if start + k < common and x.tobytes() != y.tobytes():
                return start + k
    return None


def _record(row: Any) -> dict[str, Any]:
    flags = int(row["flags"])
    names = [name for bit, name in ((SKIPPED, "skipped"), (FLUSH, "flush")) if flags & bit]
    return {
        "step": int(row["step"]),
        "seed": int(row["seed"]),
        "lr": float(row["lr"]),
        "weight_decay": float(row["weight_decay"]),
        "g": [_finite(v) for v in row["g"]],
        "flags": names,
    }


def _finite(value: Any) -> float | str:
    value = float(value)
    return value if abs(value) < float("inf") else str(value)


def _numel(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(_short(v) for v in value[:4])
        return shown if len(value) <= 4 else f"{shown}, … ({len(value)})"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return str(value)


def _print_plan(found: Any, json_output: bool) -> int:
    if json_output:
        print_json(found.to_dict())
    else:
        print_wide(found.table())
    return 0 if found.fits_gpu and found.fits_host else 1


def _print_result(title: str, values: dict[str, Any], json_output: bool) -> int:
    if json_output:
        return print_json(values)
    print_table([(k, _short(v)) for k, v in values.items()], title=title)
    return 0
