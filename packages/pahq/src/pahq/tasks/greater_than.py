"""Years that come after another (Hanna et al., arXiv:2305.00586)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

from pahq.tasks.pairs import encode, following
from pahq.tasks.sampling import collect

if TYPE_CHECKING:
    import random

    from pahq.tasks.base import Task

NOUNS = (
    "siege", "voyage", "festival", "reign", "project", "dispute", "journey", "study", "drought",
    "trial", "partnership", "survey", "boom", "strike", "friendship", "campaign",
)  # fmt: skip
CENTURIES = range(11, 18)
TEMPLATE = "The {noun} went on from the year {start} to the year"


def greater_than(tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None) -> Task:
    """Make prompts in which something goes on from one year to another, which comes later.

    The corrupted prompt starts in year 01 of the century. Right are the tokens that can only begin
    a later year, wrong are those that can only begin the year itself or an earlier one. The prompt
    ends behind the century: these are years for tokenizers with tokens of two digits, and tens for
    those with tokens of one digit (the same tens may go on either way and count for neither). For
    tokenizers that take more digits at once, the prompt ends before the year.

    Args:
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: Fewer than one pair, or more than there are, or a tokenizer that joins years.
    """
    ending = functools.cache(lambda century: _ending(tokenizer, century, bos))

    def draw(draws: random.Random) -> tuple[str, str, list[int], list[int]]:
        noun, century, year = draws.choice(NOUNS), draws.choice(CENTURIES), draws.randrange(2, 99)
        shown, tokens = ending(century)
        right, wrong = sides(tokens, year)
        clean, corrupted = (
            TEMPLATE.format(noun=noun, start=f"{century}{last:02d}") + shown for last in (year, 1)
        )
        if shown.strip() and not _splits(
            tokenizer, clean, f"{century}", f"{year:02d}", tokens.get(year, -1), bos
        ):
            right = []  # a year that is not split as the answer is
        return clean, corrupted, right, wrong

    return collect(tokenizer, draw, n, name="greater_than", seed=seed, bos=bos)


def sides(tokens: dict[int, int], year: int) -> tuple[list[int], list[int]]:
    """Return the tokens of later years only, and those of none of them.

    Args:
        tokens: What each year of a century, 0 to 99, begins with.
        year: Of the start.
    """
    years: dict[int, list[int]] = {}
    for last, token in sorted(tokens.items()):
        years.setdefault(token, []).append(last)
    right = [token for token, lasts in years.items() if lasts[0] > year]
    return right, [token for token, lasts in years.items() if lasts[-1] <= year]


def _ending(tokenizer: Any, century: int, bos: bool | None) -> tuple[str, dict[int, int]]:
    """Return what of the last year stands in the prompt, and what each year goes on with."""
    text = TEMPLATE.format(noun=NOUNS[0], start=f"{century}01")
    for shown, ahead in ((f" {century}", ""), (" ", f"{century}"), ("", f" {century}")):
        ids = encode(tokenizer, text + shown, bos)
        found = {
            last: following(tokenizer, text + shown, ids, f"{ahead}{last:02d}", bos)
            for last in range(100)
        }
        tokens = {last: token for last, token in found.items() if token is not None}
        if len(tokens) < 50:
            continue
        # some years may have a token of their own, and still be written with two
        words = tokenizer.get_vocab() if shown.strip() else {}
        lacking = [last for last in range(100) if last not in tokens]
        return shown, tokens | {
            last: words[f"{last:02d}"] for last in lacking if f"{last:02d}" in words
        }
    remedy = "make pairs of your own, with from_pairs"
    raise ValueError(message("tokenizer", "one that splits years", text, remedy))


def _splits(
    tokenizer: Any, text: str, century: str, year: str, token: int, bos: bool | None
) -> bool:
    before = text[: text.index(century) + len(century)]
    return following(tokenizer, before, encode(tokenizer, before, bos), year, bos) == token
