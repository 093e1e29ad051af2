"""What the packages' command lines have in common: exit status, JSON and tables."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]
"""An option ``--json`` for one JSON document instead of tables."""

_BAD_INPUT = (FileNotFoundError, FileExistsError, ValueError, TypeError, ImportError)
_FAILED = (OSError, RuntimeError, MemoryError, FloatingPointError)


def run_app(
    app: App, argv: list[str] | None, *, bad_input: tuple[type[Exception], ...] = ()
) -> int:
    """Run a command line; errors that a user can mend become one line on stderr.

    Args:
        app: The command line; a command may return an exit status.
        argv: Arguments; by default those of the process.
        bad_input: Further errors that mean bad input.

    Returns:
        0 done, 1 the work failed, 2 bad input.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        result = app(argv, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except (*bad_input, *_BAD_INPUT) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except _FAILED as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def print_json(value: Any) -> int:
    """Print one JSON document, and return 0.

    Raises:
        ValueError: A number that JSON does not have.
    """
    print(json.dumps(value, allow_nan=False))
    return 0


def print_table(
    rows: Iterable[Sequence[str]], columns: Sequence[str] = ("", ""), *, title: str | None = None
) -> None:
    """Print rows of strings; the header is left out if all its columns are empty."""
    from rich.table import Table

    table = Table(*columns, title=title, show_header=any(columns), title_justify="left")
    for row in rows:
        table.add_row(*row)
    print_wide(table)


def print_wide(renderable: Any) -> None:
    """Print something of rich, 200 columns wide where there is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(renderable)
