"""Plots of result files (needs matplotlib: ``pip install 'shared-kernels[plot]'``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared_kernels.units import format_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from shared_kernels.bench.report import Result

# Okabe and Ito's palette, distinguishable with every common colour-vision deficiency.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def plot_result(result: Result, path: Path) -> None:
    """Draw the medians of a result file with their p20 to p80 range and the measured limit.

    One panel per workload, one bar per arm; a vertical mark on a bar is the shortest time that
    the machine allows for that arm's bytes and FLOPs. The same result gives the same bytes.

    Args:
        result: Contents of a result file.
        path: Where to write; the suffix (``.svg`` or ``.png``) decides the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Another suffix, or no workload has times.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"expected a path that ends with .svg or .png; got {path.name!r}")
    workloads = [
        (workload["name"], [arm for arm in workload["arms"] if not arm["error"]])
        for workload in result["workloads"]
    ]
    workloads = [(name, arms) for name, arms in workloads if arms]
    if not workloads:
        raise ValueError("expected a result with at least one timed workload; got none")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'shared-kernels[plot]'") from error

    heights = [len(arms) + 1 for _, arms in workloads]
    with matplotlib.rc_context(
        {"svg.hashsalt": "shared-kernels", "font.size": 9, "svg.fonttype": "none"}
    ):
        figure = Figure(figsize=(7, 0.6 + 0.32 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(workloads), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, arms) in zip(panels, workloads, strict=True):
            _draw(panel, name, arms)
        panels[-1].set_xlabel("ms (bar: median; whisker: p20 to p80; black mark: machine's limit)")
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata=metadata)


def _draw(panel: Axes, name: str, arms: list[Result]) -> None:
    for row, arm in enumerate(arms):
        seconds = arm["seconds"]
        median = seconds["median"] * 1e3
        below, above = median - seconds["p20"] * 1e3, seconds["p80"] * 1e3 - median
        panel.barh(
            row,
            median,
            xerr=[[below], [above]],
            color=PALETTE[row % len(PALETTE)],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        panel.annotate(
            format_seconds(seconds["median"]),
            (seconds["p80"] * 1e3, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
        if arm.get("limit"):
            limit = arm["limit"]["seconds"] * 1e3
            panel.plot([limit, limit], [row - 0.4, row + 0.4], color="black", linewidth=2)
    panel.set_title(name, loc="left", fontsize="medium")
    panel.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    panel.invert_yaxis()
    panel.margins(x=0.18)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
