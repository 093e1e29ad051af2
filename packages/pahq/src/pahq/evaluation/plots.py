"""Plots of curves (need matplotlib: ``pip install 'pahq[plot]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pahq.evaluation.roc import Roc
    from pahq.evaluation.sizes import SizeCurve

#: Of Okabe and Ito, told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def plot_curve(curves: SizeCurve | Mapping[str, SizeCurve], path: str | Path) -> None:
    """Draw what circuits recover against their size.

    Args:
        curves: One, or several by what the legend calls them.
        path: Where to write; the suffix (``.svg`` or ``.png``) decides the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Another suffix.
    """
    figure, axes = _new(path)
    axes.axhline(1, color="0.6", lw=1, ls=":")
    named = curves if isinstance(curves, Mapping) else {"": curves}
    for number, (name, curve) in enumerate(named.items()):
        label = f"{name} CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}".strip()
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(curve.sizes, curve.recovered, marker="o", ms=4, color=colour, label=label)
    metrics = ", ".join(dict.fromkeys(curve.metric for curve in named.values()))
    axes.set(xscale="log", xlabel="% of edges", ylabel=f"recovered ({metrics})")
    _save(figure, axes, path)


def plot_roc(curves: Roc | Mapping[str, Roc], path: str | Path) -> None:
    """Draw true against false positives, joined as their areas are computed.

    Args:
        curves: One, or several by what the legend calls them.
        path: Where to write; the suffix (``.svg`` or ``.png``) decides the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Another suffix.
    """
    figure, axes = _new(path)
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
    named = curves if isinstance(curves, Mapping) else {"": curves}
    for number, (name, curve) in enumerate(named.items()):
        label = f"{name} AUC {curve.area:.3f} ({curve.mode})".strip()
        colour = _COLOURS[number % len(_COLOURS)]
        # right, then up: what holds until the next point is the height of the last
        style = "steps-post" if curve.mode == "pessimistic" else "default"
        axes.plot(curve.fpr, curve.tpr, drawstyle=style, color=colour, label=label)
    axes.set(xlabel="false edges / all false", ylabel="true edges / all true", xlim=(-0.02, 1.02))
    _save(figure, axes, path)


def _new(path: str | Path) -> tuple[Figure, Axes]:
    if Path(path).suffix not in (".svg", ".png"):
        raise ValueError(f"expected a path that ends with .svg or .png; got {Path(path).name!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pahq[plot]'") from error
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, axes: Axes, path: str | Path) -> None:
    import matplotlib

    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    target = Path(path)
    metadata: dict[str, Any] = {"Date": None} if target.suffix == ".svg" else {"Software": None}
    target.parent.mkdir(parents=True, exist_ok=True)
    # SVG: the same bytes for the same curve, and text that can be searched
    with matplotlib.rc_context({"svg.hashsalt": "pahq", "svg.fonttype": "none"}):
        figure.savefig(target, dpi=160, metadata=metadata)
