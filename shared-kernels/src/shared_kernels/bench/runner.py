"""Run benchmark files: gate, measurement, limit, result file."""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch

from shared_kernels.bench import report, timing
from shared_kernels.bench.ceilings import Ceilings
from shared_kernels.bench.provenance import checkout_root, command_line, describe_run
from shared_kernels.bench.registry import load_benchmarks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from shared_kernels.bench.arms import Workload

_log = logging.getLogger(__name__)


class GateError(Exception):
    """A workload's correctness gate did not pass, so there is nothing worth timing."""


def run_workload(
    workload: Workload, ceilings: Ceilings, plan: timing.Plan | None = None
) -> report.Result:
    """Check a workload, time it, and summarise it.

    Returns:
        The workload's part of a result file.

    Raises:
        GateError: The gate raised or returned ``False``.
    """
    try:
        passed = workload.check()
    except Exception as error:
        raise GateError(f"the check failed: {type(error).__name__}: {error}") from error
    if passed is False:
        raise GateError("the check returned False")
    return report.summarize(workload, timing.measure(workload, plan), ceilings)


def run_file(
    path: Path,
    *,
    only: str | None = None,
    device: str | None = None,
    plan: timing.Plan | None = None,
    save: Callable[[report.Result], object] | None = None,
) -> report.Result:
    """Run the benchmarks of one file with ``SHARED_KERNELS_STRICT=1``.

    Args:
        path: The benchmark file.
        only: Name of one registered function, or a pattern for the names of workloads
            (``"noise/*"``).
        device: ``"cuda"`` or ``"cpu"``; by default the GPU if there is one.
        plan: How long to measure.
        save: Called with the contents so far after every workload, so that a run that is
            stopped keeps what it measured.

    Returns:
        The contents of a result file. Workloads that were not right, or that could not run, are
        under ``"refused"`` with the reason.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file registers nothing, ``only`` fits nothing, or there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"expected a CUDA device for device={device!r}; torch sees none: use 'cpu'"
        )
    root = checkout_root(path)
    arguments = [str(path), *(["--only", only] if only else [])]
    if plan is not None and plan.max_seconds != timing.Plan.max_seconds:
        arguments += ["--seconds", f"{plan.max_seconds:g}"]
    result: report.Result = {
        "schema": report.SCHEMA,
        "schema_version": report.SCHEMA_VERSION,
        "benchmark": path.stem,
        "only": only,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "provenance": describe_run(command_line("shared_kernels.bench", arguments, root), root),
    }
    ceilings, rows, refused = Ceilings(device), [], []
    measured = {}
    with _strict():
        for name, workload in _workloads(path, device, only):
            _log.info("%s", name)
            try:
                if isinstance(workload, Exception):
                    raise workload
                rows.append(run_workload(workload, ceilings, plan))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                # A gate says what is wrong; anything else is a fault of the benchmark.
                trace = None if isinstance(error, GateError) else error
                _log.error("refused %s: %s", name, reason, exc_info=trace)
                refused.append({"name": name, "reason": reason})
            del workload
            measured = {"ceilings": ceilings.as_dict(), "workloads": rows, "refused": refused}
            if save is not None:
                save(result | measured)
    return result | measured


def run_files(
    files: Sequence[Path],
    out: Path | None = None,
    *,
    only: str | None = None,
    device: str | None = None,
    seconds: float | None = None,
    as_json: bool = False,
) -> int:
    """Run benchmark files as a command: results to stdout, progress to stderr.

    Args:
        files: Benchmark files.
        out: Folder of the result files, one per benchmark file and device; ``None`` writes none.
        only: See ``run_file``.
        device: See ``run_file``.
        seconds: Time budget of a workload; default that of ``timing.Plan``.
        as_json: Print one JSON list instead of tables.

    Returns:
        Exit code: 0, or 1 if a workload was refused, or 2 for bad input.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    plan = None if seconds is None else timing.Plan(max_seconds=seconds)
    results = []

    def save(result: report.Result) -> None:
        if out:
            name = report.result_name(result["benchmark"], result["device"], only)
            report.write_result(result, out / f"{name}.json")

    for file in files:
        try:
            result = run_file(file, only=only, device=device, plan=plan, save=save)
        except (FileNotFoundError, ValueError) as error:
            _log.error("%s", error)
            return 2
        results.append(result)
        if not as_json:
            _show(report.markdown_table(result))
    if as_json:
        sys.stdout.write(report.to_json(results))
    return int(any(result["refused"] for result in results))


def _workloads(
    path: Path, device: str, only: str | None
) -> Iterator[tuple[str, Workload | Exception]]:
    """Yield the selected workloads by name, or the error that a function raised making one."""
    functions = load_benchmarks(path)
    chosen = {only: functions[only]} if only in functions else functions
    pattern = "*" if only is None or only in functions else only
    skipped, found = [], False
    for name, function in chosen.items():
        try:
            for workload in function(device):
                if fnmatch(workload.name, pattern):
                    found = True
                    yield workload.name, workload
                else:
                    skipped.append(workload.name)
                # The inputs are gone before the next workload allocates its own.
                del workload
                gc.collect()
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
        except Exception as error:
            found = True
            yield name, error
    if not found:
        raise ValueError(
            f"expected {only!r} to name a benchmark of {path.name} ({', '.join(functions)}) or to "
            f"match a workload ({', '.join(skipped)}); it fits none"
        )


@contextmanager
def _strict() -> Generator[None]:
    """A kernel that cannot run raises instead of falling back: no fallback is ever timed."""
    before = os.environ.get("SHARED_KERNELS_STRICT")
    os.environ["SHARED_KERNELS_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SHARED_KERNELS_STRICT"]
        else:
            os.environ["SHARED_KERNELS_STRICT"] = before


def _show(table: str) -> None:
    if not sys.stdout.isatty():
        sys.stdout.write(table + "\n\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(table))
