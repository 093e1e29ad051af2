"""Agreement of verbs with the number of their subject (Linzen et al., arXiv:1611.01368)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.tasks.sampling import collect

if TYPE_CHECKING:
    import random

    from pahq.tasks.base import Task

NOUNS = (
    ("key", "keys"), ("teacher", "teachers"), ("painting", "paintings"), ("doctor", "doctors"),
    ("chair", "chairs"), ("bird", "birds"), ("student", "students"), ("farmer", "farmers"),
    ("book", "books"), ("horse", "horses"), ("lamp", "lamps"), ("letter", "letters"),
    ("driver", "drivers"), ("picture", "pictures"), ("bottle", "bottles"), ("tree", "trees"),
)  # fmt: skip
PLACES = (
    ("door", "doors"), ("window", "windows"), ("house", "houses"), ("garden", "gardens"),
    ("table", "tables"), ("bridge", "bridges"), ("car", "cars"), ("river", "rivers"),
)  # fmt: skip
PREPOSITIONS = ("near", "behind", "beside", "above", "below")
VERBS = ((" is", " was", " has"), (" are", " were", " have"))
TEMPLATE = "The {noun} {preposition} the {place}"


def sva(tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None) -> Task:
    """Make subjects, one or many, with another noun between them and their verb.

    The corrupted prompt has the subject in the other number; the noun between may have either.
    Right are three verbs in the number of the subject, wrong are the same in the other.

    Args:
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: Fewer than one pair, or more than there are.
    """

    def draw(draws: random.Random) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        nouns, number = draws.choice(NOUNS), draws.randrange(2)
        rest = {
            "preposition": draws.choice(PREPOSITIONS), "place": draws.choice(draws.choice(PLACES))
        }  # fmt: skip
        clean, corrupted = (TEMPLATE.format(noun=nouns[i], **rest) for i in (number, 1 - number))
        return clean, corrupted, VERBS[number], VERBS[1 - number]

    return collect(tokenizer, draw, n, name="sva", seed=seed, bos=bos)
