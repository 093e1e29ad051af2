"""Indirect object identification (Wang et al., arXiv:2211.00593)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import check_choice

from pahq.tasks.pairs import from_pairs
from pahq.tasks.sampling import check_count, singles

if TYPE_CHECKING:
    from pahq.tasks.base import Task

NAMES = (
    "Aaron", "Adam", "Alan", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anthony", "Ben", "Brian",
    "Carl", "Charles", "Chris", "Dan", "Daniel", "David", "Edward", "Emily", "Emma", "Eric",
    "Frank", "George", "Grace", "Henry", "Jack", "James", "Jane", "Jason", "Jeff", "John",
    "Joseph", "Julia", "Karen", "Kate", "Kevin", "Laura", "Linda", "Lisa", "Lucy", "Luke",
    "Maria", "Mark", "Martin", "Mary", "Matthew", "Michael", "Nick", "Paul", "Peter", "Rachel",
    "Richard", "Robert", "Ryan", "Sam", "Sarah", "Scott", "Simon", "Stephen", "Steve", "Susan",
    "Thomas", "Tom", "William",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "station", "garden", "market", "house")
THINGS = ("drink", "book", "ring", "ball", "letter", "kiss", "coin", "flower")
TEMPLATES = {
    "ABB": "When {a} and {b} went to the {place}, {b} gave a {thing} to",
    "BAB": "When {b} and {a} went to the {place}, {b} gave a {thing} to",
}


def ioi(
    tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None, order: str = "mixed"
) -> Task:
    """Make prompts in which two people are named and one of them gives something to the other.

    The corrupted prompt names three other people. Names, places and things are single tokens of
    the tokenizer, so that all prompts have as many.

    Args:
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.
        order: ``ABB`` or ``BAB``: the giver is named second, or first; ``mixed`` takes turns.

    Raises:
        ValueError: Fewer than one pair, an unknown order, or a tokenizer without enough such words.
    """
    check_count(n)
    check_choice("order", order, ("ABB", "BAB", "mixed"))
    names = singles(tokenizer, NAMES, 5, "names")
    places = singles(tokenizer, PLACES, 1, "places")
    things = singles(tokenizer, THINGS, 1, "things")
    draws = random.Random(seed)
    clean, corrupted, answers, wrong = [], [], [], []
    for number in range(n):
        kind = ("ABB", "BAB")[number % 2] if order == "mixed" else order
        a, b, c, d, e = draws.sample(names, 5)
        rest = {"place": draws.choice(places), "thing": draws.choice(things)}
        clean.append(TEMPLATES[kind].format(a=a, b=b, **rest))
        # three people, none of them twice
        first, _, last = TEMPLATES[kind].partition(",")
        corrupted.append(first.format(a=c, b=d, **rest) + "," + last.format(b=e, **rest))
        answers.append(f" {a}")
        wrong.append(f" {b}")
    task = from_pairs(tokenizer, clean, corrupted, answers, wrong, name="ioi", bos=bos)
    task.meta["seed"] = seed
    return task
