"""Command line: ``tenfold [STEPS…] [--quick] [--json] [--out FOLDER]``."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tenfold.tour import Outcome, Progress

app = App(
    name="tenfold",
    version=lambda: version("tenfold"),
    help_format="markdown",
    default_parameter=Parameter(negative=""),
)


@app.default
def tour(
    *steps: str,
    quick: bool = False,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    out: Path = Path("tenfold-report"),
) -> int:
    """Run Tenfold's packages on real inputs on this machine, and write a report.

    Every package that works today is one step. The report, `index.html` in the folder of `--out`,
    shows what each did beside the plain alternative; it is rewritten after every step. The exit
    code is 1 if a step failed; the others still run.

    Args:
        steps: Names of the packages to run; all of them by default.
        quick: Do the least that still exercises everything; the numbers then mean little.
        as_json: Print the results as JSON on standard output, progress on standard error.
        out: Folder of the report.
    """
    from tenfold.steps import discover

    known = discover()
    if unknown := [name for name in steps if name not in known]:
        print(
            f"tenfold: no step named {', '.join(unknown)}; the steps are {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    chosen = [known[name] for name in (dict.fromkeys(steps) or known)]
    with _progress_bars([step.name for step in chosen]) as progress:
        from shared_kernels.bench.provenance import describe_run

        from tenfold import report
        from tenfold.tour import run

        words = ["uv run tenfold", *dict.fromkeys(steps), *(["--quick"] if quick else [])]
        provenance = describe_run(" ".join(words))
        outcomes = []
        for outcome in run(chosen, quick=quick, progress=progress):
            outcomes.append(outcome)
            page = report.write(out, outcomes, provenance=provenance, quick=quick)
    if as_json:
        found = {"quick": quick, **provenance, "steps": [o.as_json() for o in outcomes]}
        print(json.dumps(found, indent=2))
    else:
        _print_summary(outcomes)
        print(f"Report: {page}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


@contextmanager
def _progress_bars(names: list[str]) -> Generator[Progress]:
    """Show one bar for each step on standard error; plain lines where it is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer()
        return
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[step]}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    with bars:
        tasks = {name: bars.add_task("", total=1.0, start=False, step=name) for name in names}

        def show(name: str, share: float, doing: str) -> None:
            bars.start_task(tasks[name])
            bars.update(tasks[name], completed=share, description=doing)

        yield show


def _line_printer() -> Callable[[str, float, str], None]:
    shown: dict[str, int] = {}

    def show(name: str, share: float, doing: str) -> None:
        twentieth = int(share * 20)
        if shown.get(name) != twentieth:
            shown[name] = twentieth
            print(f"{name}: {share:.0%}, {doing}", file=sys.stderr, flush=True)

    return show


def _print_summary(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tenfold.report import duration

    table = Table(box=None, pad_edge=False)
    for column in ("step", "", "result", "plain alternative", "time"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        first: list[Any] = [outcome.name, "[green]ok" if outcome.ok else "[red]failed"]
        rows = [
            (f"{m.name}: {m.text(m.value)}", f"{m.text(m.plain)} {m.plain_name}".strip())
            for m in (outcome.result.metrics if outcome.result else ())
        ] or [(outcome.error, "")]
        for index, (found, plain) in enumerate(rows):
            start = [*first, found, plain, duration(outcome.seconds)]
            table.add_row(*(start if index == 0 else ["", "", found, plain, ""]))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``tenfold`` command: exits with 0 (fine), 1 (a step failed) or 2."""
    from rich.console import Console

    app.error_console = Console(stderr=True)
    try:
        code = app(argv, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
