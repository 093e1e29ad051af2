"""Tasks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared_kernels._checks import check_choice

from pahq.tasks.capital_country import capital_country
from pahq.tasks.docstring import docstring
from pahq.tasks.gendered_pronoun import gendered_pronoun
from pahq.tasks.greater_than import greater_than
from pahq.tasks.induction import induction
from pahq.tasks.ioi import ioi
from pahq.tasks.sva import sva

if TYPE_CHECKING:
    from collections.abc import Callable

    from pahq.tasks.base import Task

_TASKS: dict[str, Callable[..., Task]] = {
    made.__name__: made
    for made in (ioi, greater_than, docstring, induction, gendered_pronoun, sva, capital_country)
}

#: What each task is about, in a line, by name.
NAMES = {
    "ioi": "whom something is given to: When Mary and John ..., John gave a book to -> Mary",
    "greater_than": "a later year: from the year 1732 to the year 17 -> 33 to 99",
    "docstring": "the next argument that a docstring tells of",
    "induction": "random tokens, repeated",
    "gendered_pronoun": "the pronoun of a name: So Anna is a very kind friend, isn't -> she",
    "sva": "the number of a verb: The keys near the door -> are, were, have",
    "capital_country": "a capital: The capital of France is the city of -> Paris",
}


def make(name: str, tokenizer: Any, n: int = 64, seed: int = 0, *, bos: bool | None = None) -> Task:
    """Make a task by its name.

    Args:
        name: One of `NAMES`.
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: Another name; otherwise as the task.
    """
    check_choice("name", name, [*NAMES])
    return _TASKS[name](tokenizer, n, seed=seed, bos=bos)
