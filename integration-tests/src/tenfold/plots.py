"""Figures for the report: SVG that follows the page's colours and needs nothing outside it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from shared_kernels.bench.plot import PALETTE

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

__all__ = ["PALETTE", "svg"]

_INK = "#010203"  # drawn in this colour, then replaced by the page's text colour


def svg(draw: Callable[[Axes], None], *, title: str, size: tuple[float, float] = (6.4, 3.4)) -> str:
    """Draw one figure and return it as a ``<svg>`` element for an HTML page.

    Text, axes and ticks take the colour and the font of the page around them, so that the figure
    reads in light and dark; it scales with the width it is given.

    Args:
        draw: Draws on the axes.
        title: Alternative text; different for every figure of a page, because it also keeps
            their ids apart.
        size: Inches, width and height.
    """
    import html

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
        ),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = text.replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'font-family: [^;"]*', "font-family: inherit", text)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    head, body = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{body}'
