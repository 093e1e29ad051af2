"""The ``flashdp`` command line: noise for a budget, the cost of noise, reports.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed or the target cannot be reached, 2 bad input. No command
loads torch before it runs.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from flashdp.config import AccountantKind  # noqa: TC001 (as above)

app = App(
    name="flashdp",
    help="Differentially private training of large models.",
    version=lambda: _version(),
    help_format="plaintext",
)

JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]


@app.command
def calibrate(
    *,
    epsilon: float,
    delta: float,
    steps: int,
    sample_rate: float | None = None,
    batch_size: float | None = None,
    units: int | None = None,
    max_batch_size: int | None = None,
    accountant: AccountantKind = "pld",
    json_output: JsonFlag = False,
) -> int:
    """Find the noise multiplier that spends a budget.

    Args:
        epsilon: Epsilon to reach.
        delta: Delta of the guarantee, far below 1 / units.
        steps: Optimizer steps.
        sample_rate: Probability with which each unit enters a step.
        batch_size: Expected units per step; with --units, instead of --sample-rate.
        units: Public number of units (rows, or users).
        max_batch_size: Larger draws are cut to a random subset of this size; needs --units.
        accountant: pld (tight) or rdp (fast, looser).
        json_output: Print JSON.
    """
    from flashdp.accounting import calibrate as find

    rate = _rate(sample_rate, batch_size, units)
    truncation = _truncation(max_batch_size, units)
    sigma = find(epsilon, delta, sample_rate=rate, steps=steps, kind=accountant, **truncation)
    return _print_cost(sigma, delta, rate, steps, accountant, truncation, json_output)


@app.command
def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    steps: int,
    sample_rate: float | None = None,
    batch_size: float | None = None,
    units: int | None = None,
    max_batch_size: int | None = None,
    accountant: AccountantKind = "pld",
    json_output: JsonFlag = False,
) -> int:
    """Compute what a run costs.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        delta: Delta of the guarantee, far below 1 / units.
        steps: Optimizer steps.
        sample_rate: Probability with which each unit enters a step.
        batch_size: Expected units per step; with --units, instead of --sample-rate.
        units: Public number of units (rows, or users).
        max_batch_size: Larger draws are cut to a random subset of this size; needs --units.
        accountant: pld (tight) or rdp (fast, looser).
        json_output: Print JSON.
    """
    rate = _rate(sample_rate, batch_size, units)
    truncation = _truncation(max_batch_size, units)
    return _print_cost(noise_multiplier, delta, rate, steps, accountant, truncation, json_output)


@app.command
def report(run_dir: Path, *, json_output: JsonFlag = False) -> int:
    """Print the privacy report of a run.

    Args:
        run_dir: Folder of the run, with its privacy_report.json.
        json_output: Print JSON.
    """
    from flashdp.report import PrivacyReport

    found = PrivacyReport.load(run_dir)
    if json_output:
        return _print_json(found.to_dict())
    print(found.to_markdown(), end="")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        result = app(argv, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except (FileNotFoundError, FileExistsError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, MemoryError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def _version() -> str:
    from flashdp._version import __version__

    return __version__


def _rate(sample_rate: float | None, batch_size: float | None, units: int | None) -> float:
    if (sample_rate is None) == (batch_size is None):
        raise ValueError("give either --sample-rate, or --batch-size with --units")
    if sample_rate is not None:
        return sample_rate
    if units is None or units < 1 or batch_size is None:
        raise ValueError(f"--batch-size needs --units of at least 1, got {units}")
    return batch_size / units


def _truncation(max_batch_size: int | None, units: int | None) -> dict[str, Any]:
    if max_batch_size is None:
        return {}
    if units is None:
        raise ValueError("--max-batch-size needs --units: a cap's cost depends on their number")
    return {
        "sampling": "truncated",
        "dataset_size": units,
        "truncated_batch_size": max_batch_size,
    }


def _print_cost(
    sigma: float,
    delta: float,
    rate: float,
    steps: int,
    kind: AccountantKind,
    truncation: dict[str, Any],
    json_output: bool,
) -> int:
    from flashdp.accounting import Accountant, Mechanism

    accountant = Accountant(kind)
    accountant.step(Mechanism(noise_multiplier=sigma, sample_rate=rate, **truncation), steps=steps)
    cost = accountant.epsilon(delta)
    values = {
        "noise_multiplier": sigma,
        "epsilon": cost if math.isfinite(cost) else str(cost),
        "delta": delta,
        "sample_rate": rate,
        "steps": steps,
        "max_batch_size": truncation.get("truncated_batch_size"),
        "accountant": kind,
        "version": accountant.version,
    }
    if json_output:
        return _print_json(values)
    _print_table([(name, _short(v)) for name, v in values.items() if v is not None])
    return 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_json(value: Any) -> int:
    print(json.dumps(value, allow_nan=False))
    return 0


def _print_table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
