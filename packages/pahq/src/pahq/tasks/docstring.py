"""Arguments of a function, told again in its docstring (Heimersheim and Janiak, 2023).

"A circuit for Python docstrings in a 4-layer attention-only transformer", Alignment Forum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.tasks.sampling import collect, singles

if TYPE_CHECKING:
    import random

    from pahq.tasks.base import Task

WORDS = (
    "action", "address", "amount", "angle", "area", "author", "balance", "block", "border",
    "branch", "budget", "button", "case", "cell", "change", "channel", "city", "client", "code",
    "color", "column", "content", "cost", "count", "course", "date", "depth", "detail", "device",
    "edge", "energy", "event", "factor", "field", "file", "filter", "form", "format", "frame",
    "group", "height", "image", "index", "item", "label", "layer", "letter", "level", "limit",
    "line", "list", "load", "map", "mask", "message", "method", "model", "name", "node", "number",
    "object", "option", "order", "owner", "page", "parent", "path", "pattern", "phase", "plan",
    "point", "price", "process", "range", "rate", "record", "region", "result", "role", "root",
    "row", "scale", "score", "section", "shape", "signal", "size", "source", "space", "speed",
    "state", "step", "style", "table", "target", "task", "text", "time", "title", "token", "type",
    "unit", "user", "value", "version", "weight", "width", "window",
)  # fmt: skip
TEMPLATE = '''def {0}(self, {1}, {2}, {3}, {4}, {5}, {6}):
    """{7} {8} {9}

    :param {10}: {11} {12}
    :param {13}: {14} {15}
    :param'''
_DEFINED, _TOLD, _WORDS = range(1, 7), (10, 13), 16


def docstring(tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None) -> Task:
    """Make beginnings of functions whose docstring comes to the third of its arguments.

    Six arguments are defined; the docstring tells of the third and the fourth, and the fifth comes
    next. In the corrupted prompt other arguments are defined, and the docstring tells of others
    again (``random_random``), so that nothing says what comes next; the text is the same. Wrong are
    the arguments that are defined in either prompt, apart from the right one, and the two that
    either docstring tells of. All words are single tokens.

    Args:
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: Fewer than one pair, or a tokenizer without enough single words.
    """
    words = singles(tokenizer, WORDS, _WORDS + 8, "words")

    def draw(draws: random.Random) -> tuple[str, str, str, list[str]]:
        drawn = draws.sample(words, _WORDS + 8)
        clean, fresh = drawn[:_WORDS], iter(drawn[_WORDS:])
        for told, defined in zip(_TOLD, (3, 4), strict=True):
            clean[told] = clean[defined]
        corrupted = [
            next(fresh) if place in (*_DEFINED, *_TOLD) else word
            for place, word in enumerate(clean)
        ]
        right = clean[5]
        names = [line[place] for line in (clean, corrupted) for place in (*_DEFINED, *_TOLD)]
        wrong = [f" {word}" for word in dict.fromkeys(names) if word != right]
        return TEMPLATE.format(*clean), TEMPLATE.format(*corrupted), f" {right}", wrong

    return collect(tokenizer, draw, n, name="docstring", seed=seed, bos=bos)
