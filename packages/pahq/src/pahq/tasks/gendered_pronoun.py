"""The pronoun of a name (Mathwin et al., 2023).

"Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 Small".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.tasks.sampling import collect, singles

if TYPE_CHECKING:
    import random

    from pahq.tasks.base import Task

NAMES = {
    " she": (
        "Alice", "Amy", "Anna", "Emily", "Emma", "Grace", "Jane", "Julia", "Karen", "Kate",
        "Laura", "Linda", "Lisa", "Lucy", "Maria", "Mary", "Rachel", "Sarah", "Susan",
    ),
    " he": (
        "Andrew", "Anthony", "Brian", "Carl", "Charles", "Daniel", "David", "Edward", "Frank",
        "George", "Henry", "Jack", "James", "John", "Joseph", "Kevin", "Mark", "Michael", "Paul",
        "Peter", "Richard", "Robert", "Thomas", "William",
    ),
}  # fmt: skip
ROLES = ("neighbour", "friend", "cook", "guest", "listener", "teacher", "writer", "colleague")
TEMPLATE = "So {name} is a very kind {role}, isn't"


def gendered_pronoun(
    tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None
) -> Task:
    """Make statements about someone, up to the pronoun of the question behind them.

    The corrupted prompt has a name that goes with the other pronoun. Names are single tokens.

    Args:
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: Fewer than one pair, more than there are, or a tokenizer without single names.
    """
    names = {key: singles(tokenizer, words, 1, "names") for key, words in NAMES.items()}

    def draw(draws: random.Random) -> tuple[str, str, str, str]:
        right, wrong = draws.sample(sorted(names), 2)
        role = draws.choice(ROLES)
        clean, corrupted = (
            TEMPLATE.format(name=draws.choice(names[key]), role=role) for key in (right, wrong)
        )
        return clean, corrupted, right, wrong

    return collect(tokenizer, draw, n, name="gendered_pronoun", seed=seed, bos=bos)
