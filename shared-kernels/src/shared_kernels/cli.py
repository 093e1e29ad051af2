"""Command line: ``shared-kernels env | doctor | bench | report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from shared_kernels.versions import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

app = App(
    name="shared-kernels",
    version=__version__,
    help="Kernels, offload engine and benchmarks of the Tenfold packages.",
    help_format="markdown",
)

Json = Annotated[bool, Parameter(name="--json", negative="")]


@app.command
def env(*, as_json: Json = False) -> int:
    """Print what a bug report needs: versions, flags, processors, memory limits.

    Args:
        as_json: Print JSON instead of a table.
    """
    from shared_kernels.diagnostics import environment

    found = environment()
    if as_json:
        _print_json(found)
        return 0
    rows = []
    for section, values in found.items():
        fields = values.items() if isinstance(values, dict) else [("", "none")]
        for index, (name, value) in enumerate(fields or [("", "none set")]):
            rows.append((section if index == 0 else "", name, _readable(name, value)))
    _print_table(("", "what", "found"), rows)
    return 0


@app.command
def doctor(*, as_json: Json = False) -> int:
    """Check that the kernels work on this machine and say what to do where they do not.

    The exit code is 1 if a check failed; warnings do not count.

    Args:
        as_json: Print JSON instead of a table.
    """
    from dataclasses import asdict

    from shared_kernels.diagnostics import run_checks

    checks = run_checks()
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        rows = [
            (f"[{colours[check.status]}]{check.status}", check.name, check.detail, check.remedy)
            for check in checks
        ]
        _print_table(("", "check", "found", "remedy"), rows)
    return int(any(check.status == "fail" for check in checks))


@app.command
def bench(
    files: list[Path],
    /,
    *,
    out: Path | None = None,
    only: str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    seconds: float | None = None,
    as_json: Json = False,
) -> int:
    """Time the arms of benchmark files against each other and against this machine's limits.

    Args:
        files: Benchmark files.
        out: Folder for the result files.
        only: Name of one benchmark function, or a pattern for names of workloads.
        device: Where to run; the GPU if there is one.
        seconds: Time budget of a workload; 60 by default.
        as_json: Print JSON instead of tables.
    """
    from shared_kernels.bench.runner import run_files

    return run_files(files, out, only=only, device=device, seconds=seconds, as_json=as_json)


@app.command
def report(
    readmes: list[Path],
    /,
    *,
    results: Path | None = None,
    check: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Remake the benchmark tables of READMEs from their result files.

    Args:
        readmes: Markdown files with `<!-- bench:NAME -->` blocks, or `bench:NAME: PARAM + PARAM`.
        results: Folder of the result files; `benchmarks/results` beside each README by default.
        check: Change nothing; the exit code is 1 if a table is out of date.
    """
    from shared_kernels.bench import render_readme

    stale = []
    for readme in readmes:
        try:
            if not render_readme(readme, results, check=check):
                stale.append(readme)
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    for readme in stale:
        print(f"{readme}: {'out of date' if check else 'rewritten'}")
    return int(check and bool(stale))


def main(argv: list[str] | None = None) -> None:
    """Entry point: exits with 0 (fine), 1 (the work failed) or 2 (bad input)."""
    from cyclopts import CycloptsError
    from rich.console import Console

    app.error_console = Console(stderr=True)
    try:
        code = app(argv, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _readable(name: str, value: object) -> str:
    from shared_kernels.units import format_bytes

    if value is None:
        return "no limit" if name in ("cgroup_free", "memlock") else "-"
    if name.endswith("_bytes") or name in ("total", "available", "cgroup_free", "memlock"):
        return format_bytes(value) if isinstance(value, int) else str(value)
    return str(value)
