"""Run the steps of the tour one after another, whatever becomes of each."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.step import Context, StepFailed

if TYPE_CHECKING:
    from tenfold.step import Step, StepResult

logger = logging.getLogger(__name__)

Progress = Callable[[str, float, str], None]
"""Called with a step's name, the share of it done (0 to 1), and what is going on."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        name: The step's name.
        title: The step's title.
        seconds: How long it took.
        result: What it found; ``None`` if it failed.
        error: Why it failed, in a line; empty if it did not.
        details: The traceback, where the failure was not foreseen.
    """

    name: str
    title: str
    seconds: float
    result: StepResult | None = None
    error: str = ""
    details: str = ""

    @property
    def ok(self) -> bool:
        """Whether the step did what it promises."""
        return self.result is not None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        found = self.result.as_json() if self.result else {"error": self.error}
        return {"name": self.name, "ok": self.ok, "seconds": round(self.seconds, 2), **found}


def run(
    steps: Sequence[Step],
    *,
    quick: bool = False,
    progress: Progress = lambda name, share, doing: None,
) -> Iterator[Outcome]:
    """Run steps in order and yield what became of each; a failure does not stop the others.

    Args:
        steps: What to run.
        quick: Do the least that still exercises everything.
        progress: Told how far the current step is.
    """
    for step in steps:
        began = time.perf_counter()
        result, error, details = None, "", ""
        progress(step.name, 0.0, "starting")
        with tempfile.TemporaryDirectory(prefix=f"tenfold-{step.name}-") as folder:
            context = Context(
                quick=quick,
                folder=Path(folder),
                progress=lambda share, doing, name=step.name: progress(name, share, doing),
            )
            try:
                result = step.run(context)
            except StepFailed as failure:
                error = str(failure)
            except Exception as failure:
                logger.debug("step %s failed", step.name, exc_info=True)
                error = f"{type(failure).__name__}: {failure}"
                details = traceback.format_exc()
        progress(step.name, 1.0, "done" if result else "failed")
        seconds = time.perf_counter() - began
        yield Outcome(step.name, step.title, seconds, result, error, details)
