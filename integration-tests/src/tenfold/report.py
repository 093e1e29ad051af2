"""The report: one HTML file that opens offline, on a phone as on a desk, in light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tenfold.step import Metric
    from tenfold.tour import Outcome


def write(
    folder: Path, outcomes: Sequence[Outcome], *, provenance: dict[str, Any], quick: bool
) -> Path:
    """Write ``index.html`` and return its path; an older one is replaced in one step.

    Args:
        folder: Where to write; created if missing.
        outcomes: What became of the steps.
        provenance: From `shared_kernels.bench.provenance.describe_run`.
        quick: Whether the numbers come from a quick run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    scratch = path.with_suffix(".html.new")
    scratch.write_text(render(outcomes, provenance=provenance, quick=quick), encoding="utf-8")
    scratch.replace(path)
    return path


def render(outcomes: Sequence[Outcome], *, provenance: dict[str, Any], quick: bool) -> str:
    """Return the page as text; all that it needs is inside it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("tenfold"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["duration"] = duration
    page.filters["bar"] = bar
    return page.get_template("report.html.j2").render(
        outcomes=outcomes,
        provenance=provenance,
        facts=facts(provenance),
        quick=quick,
        total=sum(outcome.seconds for outcome in outcomes),
    )


def duration(seconds: float) -> str:
    """Format seconds for people: ``8.2 s``, ``2 min 05 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def bar(metric: Metric) -> tuple[float, float] | None:
    """Return the lengths, in per cent, of the bars of a metric and of its plain alternative."""
    if metric.plain is None or min(metric.value, metric.plain) < 0:
        return None
    longest = max(metric.value, metric.plain) or 1.0
    return 100 * metric.value / longest, 100 * metric.plain / longest


def facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader must know of the machine and the software, as rows."""
    cpu, gpu = provenance["cpu"], provenance["gpu"]
    commit = provenance["commit"] or "unknown"
    rows = [
        ("command", provenance["command"]),
        ("date", provenance["date"]),
        ("commit", f"{commit[:12]}{' with changes' if provenance['dirty'] else ''}"),
        ("processor", f"{cpu['model']}, {cpu['usable_cores']} cores usable"),
        ("memory", f"{cpu['memory_bytes'] / 2**30:.0f} GiB"),
        ("GPU", gpu["name"] if gpu else "none"),
        ("load average at the start", ", ".join(str(x) for x in provenance["load_average"])),
    ]
    rows += [(name, version) for name, version in provenance["versions"].items() if version]
    rows += list(provenance["flags"].items())
    return rows
