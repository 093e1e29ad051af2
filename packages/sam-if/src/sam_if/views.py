"""What each training sample did, and which labels look wrong, to look at.

A page is one file that opens offline, on a phone as on a desk, in light and dark. It has no scripts
and asks for nothing outside it, and whatever a sample says is shown as text. Pictures need Pillow,
and `render_png` needs matplotlib: ``pip install 'sam-if[plot]'`` has both.
"""

from __future__ import annotations

import io
import math
import sys
import textwrap
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from shared_kernels._checks import check_range, message
from shared_kernels.files import write_bytes, write_text
from torch import Tensor

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes
    from PIL.Image import Image

    from sam_if.detect import Suspects
    from sam_if.scores import Scores

#: Longest side of an embedded picture, and up to which its pixels are drawn as squares.
_PICTURE, _TINY = 256, 64
#: Of what is shown of a text and of numbers, at most.
_CHARACTERS, _LINES, _NUMBERS = 280, 8, 8
_HELPED, _HARMED = "helped", "harmed"
_ARROWS = {_HELPED: "\u25b2", _HARMED: "\u25bc"}
#: Of Okabe and Ito, told apart by colour-blind readers.
_COLOURS = {_HELPED: "#0072b2", _HARMED: "#b3400a"}
_CONVENTION = (
    "A score is by how much the query would rise if the sample had not been trained on. Where the "
    "query is a loss, samples above 0 (\u25b2) helped and those below (\u25bc) harmed."
)
_MEANINGS = {
    "margin": "how far the given label's logit was below the largest other one, a mean of the run",
    "end_margin": "how far the given label's logit is below the largest other one at the end",
    "loss": "the loss at the end",
    "self_influence": "by how much the sample's own loss would rise without it",
    "left_out_loss": "the loss as if the sample had not been trained on, to first order",
}


@dataclass(frozen=True, eq=False)
class Card:
    """A training sample or a query, as it is shown.

    Attributes:
        content: A picture, ``(h, w)``, ``(1, h, w)``, ``(3, h, w)`` or ``(h, w, 3)`` with floats
            from 0 to 1 or uint8, or one of Pillow; where both could be, channels are the first. Or
            text. Or other numbers, or any of them but pictures by name, which are shortened.
        label: Its label, in words.
        note: What else there is to say.
    """

    content: Tensor | np.ndarray | Image | str | Mapping[str, Any]
    label: str | None = None
    note: str | None = None


def render_html(
    scores: Scores,
    queries: Sequence[Any] | None,
    samples: Sequence[Any],
    path: str | os.PathLike[str] | None = None,
    *,
    k: int = 8,
    titles: Sequence[str] | None = None,
) -> str:
    """Return a page with the samples that helped and harmed each query most.

    Args:
        scores: Of the queries and samples.
        queries: A `Card` for each, or its content; None for the mean of all queries.
        samples: The same of all training data, in their order. Those that are shown are looked up.
        path: Where to write the page, too.
        k: Samples of each kind, at most; those with a score of 0 are of neither.
        titles: Of the queries.

    Raises:
        ImportError: There are pictures, and Pillow is not installed.
        TypeError: A content of another type.
        ValueError: Another number of queries, samples or titles than of scores; scores that are not
            finite; a picture with values out of range; or ``k`` below 1.
    """
    look, sections = _looking_up(samples), []
    for number, (title, note, query, top) in enumerate(_asked(scores, queries, samples, titles, k)):
        longest = max((abs(score) for found in top.values() for _, score in found), default=0.0)
        groups = [
            {
                "title": f"{arrow} {kind} most", "kind": kind, "rows": [
                    look(sample) | {
                        "value": f"{arrow} {score:+.3g}", "width": 100 * abs(score) / longest,
                        "head": f"sample {sample}",
                    }
                    for sample, score in top[kind]
                ],
            }
            for kind, arrow in _ARROWS.items()
        ]  # fmt: skip
        shown = None if query is None else _shown(query, f"queries[{number}]")
        sections.append({"title": title, "note": note, "query": shown, "groups": groups})
    facts = [
        f"Method: {scores.method}. Queries: {len(scores.values)}. Training samples: "
        f"{len(samples)}. Reliable: {'yes' if scores.reliable else 'no'}.",
        _CONVENTION,
    ]
    return _page("What training samples did", facts, scores.warnings, sections, path)


def render_suspects(
    suspects: Suspects,
    samples: Sequence[Any],
    path: str | os.PathLike[str] | None = None,
    *,
    k: int = 24,
    label_names: Sequence[str] | Mapping[int, str] | None = None,
) -> str:
    """Return a page with the samples whose labels are the most suspicious.

    Args:
        suspects: As `detect_mislabels` returns them.
        samples: A `Card` for each training sample, or its content, in the order of the data.
        path: Where to write the page, too.
        k: Samples, at most.
        label_names: What labels are called; by default as the cards say, else by number.

    Raises:
        ImportError: There are pictures, and Pillow is not installed.
        TypeError: A content of another type.
        ValueError: A suspect that is not among the samples, a label without a name, a score that is
            not finite, a picture with values out of range, or ``k`` below 1.
    """
    check_range("k", k, 1, 1 << 31, "how many suspects to show")
    shown, look, rows = suspects.rows[:k], _looking_up(samples), []
    for row in shown:
        if not 0 <= row.sample < len(samples):
            expected = f"all training samples, as suspect {row.sample} is one"
            raise ValueError(message("samples", expected, len(samples), "give them in their order"))
        if not math.isfinite(row.score):
            raise ValueError(_not_finite("suspects", f"{row.score} for sample {row.sample}"))
    longest = max((row.score for row in shown if row.score > 0), default=1.0)
    for row in shown:
        card = look(row.sample)
        label = card["label"]
        if row.label is not None:
            label = _name(row.label, label_names) if label_names else label or str(row.label)
        head = f"{row.rank}. sample {row.sample}, loss {row.loss:.3g}"
        value, width = f"{suspects.score} {row.score:+.3g}", 100 * max(row.score, 0.0) / longest
        rows.append(card | {"label": label, "value": value, "width": width, "head": head})
    meaning = _MEANINGS.get(suspects.score)
    facts = [
        f"The first {len(shown)} of {len(suspects)} samples, the most suspicious first.",
        f"Score: {suspects.score}" + (f", {meaning}." if meaning else "."),
    ]
    group = {"title": "Given labels that look wrong", "kind": _HARMED, "rows": rows}
    section = {"title": None, "note": None, "query": None, "groups": [group]}
    return _page("Suspicious labels", facts, [], [section], path)


def render_png(
    scores: Scores,
    queries: Sequence[Any] | None,
    samples: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    k: int = 6,
) -> None:
    """Draw each query at the left, and the samples that helped above those that harmed.

    Args:
        scores: Of the queries and samples; of a few queries, or their mean.
        queries: A `Card` for each, or its content; None for the mean of all queries.
        samples: The same of all training data, in their order. Those that are shown are looked up.
        path: Where to write; ends with ``.png``.
        k: Samples of each kind, at most.

    Raises:
        ImportError: matplotlib, or Pillow for pictures, is not installed.
        TypeError: A content of another type.
        ValueError: As for `render_html`, or another suffix.
    """
    if Path(path).suffix != ".png":
        raise ValueError(message("path", "one that ends with .png", Path(path).name, "rename it"))
    every = _asked(scores, queries, samples, None, k)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("render_png needs matplotlib: pip install 'sam-if[plot]'") from error
    columns = 1 + max(1, *(len(found) for *_, top in every for found in top.values()))
    figure = Figure(figsize=(1.5 * columns, 3.7 * len(every) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * len(every), columns)
    for number, (title, _, query, top) in enumerate(every):
        axes, first = figure.add_subplot(grid[2 * number : 2 * number + 2, 0]), 2 * number
        card, head = (Card(title), "") if query is None else (query, title)
        _draw(axes, card, f"queries[{number}]", head, "0.1")
        for line, (kind, arrow) in enumerate(_ARROWS.items(), first):
            for column, (sample, score) in enumerate(top[kind], 1):
                head = f"{arrow} {score:+.3g}\nsample {sample}"
                axes = figure.add_subplot(grid[line, column])
                _draw(axes, _card(samples[sample]), f"samples[{sample}]", head, _COLOURS[kind])
    told = "; ".join(["reliable" if scores.reliable else "not reliable", *scores.warnings])
    width = 18 * columns
    figure.suptitle(
        _wrapped(f"{scores.method}: by how much the query would rise without a sample", width)
        + "\n" + _wrapped(told, width),
        fontsize=8, color="0.35", parse_math=False,
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _asked(
    scores: Scores,
    queries: Sequence[Any] | None,
    samples: Sequence[Any],
    titles: Sequence[str] | None,
    k: int,
) -> list[tuple[str, str, Card | None, dict[str, list[tuple[int, float]]]]]:
    """Return title, counts, query, and the samples of each kind, of all that is shown."""
    check_range("k", k, 1, 1 << 31, "how many samples of each kind to show")
    count, size = scores.values.shape
    if len(samples) != size:
        remedy = "give all training data, in their order"
        raise ValueError(message("samples", f"{size}, as scores has", len(samples), remedy))
    bad = (~scores.values.isfinite()).nonzero()
    if len(bad):
        row, sample = bad[0].tolist()
        got = f"{float(scores.values[row, sample])} for query {row} and sample {sample}"
        raise ValueError(_not_finite("scores", got))
    if not count:
        raise ValueError(message("queries", "at least one in scores", 0, "ask something"))
    names = [f"Query {number}" for number in range(count)]
    if queries is None:
        scores = replace(scores, values=scores.mean()[None])
        names = [f"Mean of {count} queries" if count > 1 else "What was asked"]
    elif len(queries) != count:
        remedy = "give one for each row of scores, or None for their mean"
        raise ValueError(message("queries", f"{count}, as scores has", len(queries), remedy))
    if titles is not None and len(titles) != len(names):
        remedy = "give one for each query that is shown"
        raise ValueError(message("titles", str(len(names)), len(titles), remedy))
    every = []
    for row, title in enumerate(names if titles is None else titles):
        helped, harmed = scores.top(k, row), scores.top(k, row, harmful=True)
        top = {
            _HELPED: [found for found in helped if found[1] > 0],
            _HARMED: [found for found in harmed if found[1] < 0],
        }
        above, below = int((scores.values[row] > 0).sum()), int((scores.values[row] < 0).sum())
        counts = f"{above} of {size} samples are above 0, {below} below."
        query = None if queries is None else _card(queries[row])
        every.append((title, counts, query, top))
    return every


def _looking_up(samples: Sequence[Any]) -> Callable[[int], dict[str, Any]]:
    """Return what shows a sample, and keeps it for the next time."""
    return cache(lambda sample: _shown(_card(samples[sample]), f"samples[{sample}]"))


def _name(label: int, names: Sequence[str] | Mapping[int, str]) -> str:
    known = names if isinstance(names, Mapping) else dict(enumerate(names))
    if label not in known:
        expected = f"a name for label {label}"
        raise ValueError(message("label_names", expected, sorted(known)[:8], "name all labels"))
    return known[label]


def _not_finite(name: str, got: str) -> str:
    return message(name, "finite numbers", got, "look where the run diverged")


def _card(given: Any) -> Card:
    return given if isinstance(given, Card) else Card(given)


def _shown(card: Card, name: str) -> dict[str, Any]:
    """Return what the page shows of a card."""
    picture = _picture(card.content, name)
    found: dict[str, Any] = {"label": card.label, "note": card.note, "picture": None, "parts": []}
    if picture is None:
        return found | {"parts": _parts(card.content, name)}
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    uri = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
    return found | {"picture": {"uri": uri, "tiny": max(picture.size) <= _TINY}}


def _parts(content: Any, name: str) -> list[tuple[str | None, str, str | None]]:
    """Return names, short texts, and whole ones where they are longer."""
    if isinstance(content, Mapping):
        return [(str(key), *_words(part, f"{name}[{key!r}]")) for key, part in content.items()]
    return [(None, *_words(content, name))]


def _words(value: Any, name: str) -> tuple[str, str | None]:
    """Return a short text of a value, and the whole one where it is longer."""
    if isinstance(value, str):
        short = "\n".join(value.splitlines()[:_LINES])[:_CHARACTERS]
        return (value, None) if len(short) >= len(value.rstrip()) else (f"{short} \u2026", value)
    if value is None or isinstance(value, int):
        return str(value), None
    if isinstance(value, float | np.generic):
        return f"{value:.4g}", None
    if isinstance(value, Tensor | np.ndarray):
        numbers = _array(value)
        if np.issubdtype(numbers.dtype, np.number) or numbers.dtype == bool:
            flat = numbers.reshape(-1)
            shown = [f"{number:.4g}" for number in flat[:_NUMBERS].tolist()]
            more = ["\u2026"] if len(flat) > _NUMBERS else []
            return " ".join([*shown, *more, str(numbers.shape)]), None
    expected = "a tensor or an array of numbers, a picture of Pillow, text, or a mapping of such"
    raise TypeError(message(name, expected, type(value).__name__, "convert it, or say it in words"))


def _clean(text: str) -> str:
    """Return text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    # numpy has no bfloat16
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _picture(content: Any, name: str) -> Image | None:
    """Return content as a picture to embed, or None where it is none.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: Values out of range.
    """
    loaded = sys.modules.get("PIL.Image")
    if loaded is not None and isinstance(content, loaded.Image):
        if content.mode.startswith(("I", "F")):
            remedy = "scale it to 0..255 and convert('L')"
            raise ValueError(message(name, "a picture of 8 bits", content.mode, remedy))
        return _small(content)
    pixels = _pixels(content, name)
    if pixels is None:
        return None
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'sam-if[plot]'") from error
    return _small(Image.fromarray(pixels))


def _pixels(content: Any, name: str) -> np.ndarray | None:
    """Return what looks like a picture as uint8, ``(h, w)`` or ``(h, w, 3)``."""
    if not isinstance(content, Tensor | np.ndarray):
        return None
    values = _array(content)
    if values.ndim == 3:
        if values.shape[0] in (1, 3):
            values = np.moveaxis(values, 0, -1)
        elif values.shape[-1] not in (1, 3):
            return None
        values = values[..., 0] if values.shape[-1] == 1 else values
    # one row of numbers is a sample with a batch of one
    if values.ndim not in (2, 3) or min(values.shape[:2]) < 2:
        return None
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        return None
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        remedy = "undo its normalisation, or flatten what is no picture"
        got = f"{low:.3g} to {high:.3g}"
        raise ValueError(message(name, "a picture with floats from 0 to 1", got, remedy))
    return np.ascontiguousarray((values * 255).round().astype(np.uint8))


def _small(picture: Image) -> Image:
    """Return a picture as it is held, no larger than a page needs it."""
    from PIL import ImageOps

    found = ImageOps.exif_transpose(picture)
    if found.mode not in ("L", "RGB", "RGBA"):
        found = found.convert("RGBA" if found.has_transparency_data else "RGB")
    found.thumbnail((_PICTURE, _PICTURE))
    return found


def _draw(axes: Axes, card: Card, name: str, head: str, colour: str) -> None:
    """Draw a card with a title."""
    picture = _picture(card.content, name)
    axes.set(xticks=[], yticks=[])
    if picture is None:
        lines = [f"{key}: {text}" if key else text for key, text, _ in _parts(card.content, name)]
        text = "\n".join(_wrapped(line, 20) for line in lines)
        axes.text(0.05, 0.95, text, transform=axes.transAxes, va="top", size=7, parse_math=False)
    else:
        how = "nearest" if max(picture.size) <= _TINY else "antialiased"
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation=how)
    for side in axes.spines.values():
        side.set_color("0.85")
    said = [f"label {card.label}" if card.label else "", card.note or ""]
    said = [_wrapped(text, 22, 1) for text in said if text]
    axes.set_title("\n".join([head, *said]), size=8, color=colour, parse_math=False)


def _wrapped(text: str, width: int, lines: int = _LINES) -> str:
    return textwrap.fill(_clean(text), width, max_lines=lines, placeholder=" \u2026")


def _page(
    title: str,
    facts: list[str],
    warnings: list[str],
    sections: list[dict[str, Any]],
    path: str | os.PathLike[str] | None,
) -> str:
    """Return a page, and write it if there is a path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sam_if"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = {"title": title, "facts": facts, "warnings": warnings, "sections": sections}
    page = _clean(environment.get_template("views.html.j2").render(shown, colours=_COLOURS))
    if path is not None:
        write_text(path, page)
    return page
