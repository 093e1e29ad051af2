"""What a step of the tour is: a name, a title, and a function that does a package's real work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """A number that a user would care about, beside the plain alternative's if there is one.

    Attributes:
        name: What is measured, in plain words.
        value: The package's number.
        unit: ``"%"``, ``"s"``, ``"MB"``…; empty for a count or a ratio.
        plain: The plain alternative's number, in the same unit.
        plain_name: What the plain alternative is.
        digits: Decimal places to show.
    """

    name: str
    value: float
    unit: str = ""
    plain: float | None = None
    plain_name: str = ""
    digits: int = 1

    def text(self, value: float | None) -> str:
        """Format a value of this metric with its unit; empty for ``None``."""
        if value is None:
            return ""
        gap = "" if self.unit in ("", "%") else " "
        return f"{value:,.{self.digits}f}{gap}{self.unit}"


@dataclass(frozen=True)
class Table:
    """A table of the report; cells are shown as they are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
        title: Also its alternative text.
        svg: A ``<svg>`` element, from `tenfold.plots.svg`.
        caption: One sentence that says what to see.
    """

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        headline: One sentence with the number that matters.
        text: Paragraphs that say what was run, on what, and what the numbers do not say.
        metrics: Numbers, the most important first.
        tables: Tables.
        plots: Figures.
    """

    headline: str
    text: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the numbers and tables as JSON values, without the figures."""
        return {
            "headline": self.headline,
            "metrics": [
                {
                    "name": m.name,
                    "value": m.value,
                    "unit": m.unit,
                    "plain": m.plain,
                    "plain_name": m.plain_name,
                }
                for m in self.metrics
            ],
            "tables": [
                {"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]}
                for t in self.tables
            ],
        }


class StepFailed(Exception):
    """A step ran, and its result is not what the package promises."""


@dataclass(frozen=True)
class Context:
    """What a step is given.

    Attributes:
        quick: Do the least that still exercises everything; numbers then mean little.
        folder: An empty folder for the step's files, removed after it.
        progress: Called with the share done, 0 to 1, and what is going on.
    """

    quick: bool
    folder: Path
    progress: Callable[[float, str], None] = field(default=lambda share, doing: None)


class Step(Protocol):
    """One package's part of the tour: an object named ``STEP`` in a module of `tenfold.steps`.

    The module must be cheap to import: heavy packages are imported inside ``run``.
    """

    @property
    def name(self) -> str:
        """What a user types: the package's name."""
        ...

    @property
    def title(self) -> str:
        """What it shows, in a few words."""
        ...

    def run(self, context: Context) -> StepResult:
        """Do the work; raise `StepFailed` if a promise is not kept."""
        ...
