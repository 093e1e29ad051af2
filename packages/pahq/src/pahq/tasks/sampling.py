"""What the tasks made of templates share: words, and draws until prompts fit together."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

from pahq.tasks.pairs import encode_pair, from_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pahq.tasks.base import Task
    from pahq.tasks.pairs import Answer


def check_count(n: int) -> None:
    """Check how many pairs are wanted.

    Raises:
        ValueError: Fewer than one.
    """
    if n < 1:
        raise ValueError(message("n", "at least 1", n, "a task has a pair"))


def singles(tokenizer: Any, words: Sequence[str], least: int, what: str) -> list[str]:
    """Return the words that are one token between others.

    Raises:
        ValueError: Fewer than ``least``.
    """
    size = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    without = size("When and")
    found = [word for word in words if size(f"When {word} and") == without + 1]
    if len(found) < least:
        remedy = "make pairs of your own, with from_pairs"
        expected = f"single tokens for {what}, {least} at least"
        raise ValueError(message("tokenizer", expected, len(found), remedy))
    return found


def collect(
    tokenizer: Any,
    draw: Callable[[random.Random], tuple[str, str, Answer, Answer]],
    n: int,
    *,
    name: str,
    seed: int,
    bos: bool | None,
) -> Task:
    """Draw pairs until n different ones have prompts of one length.

    Args:
        tokenizer: The model's.
        draw: Makes clean and corrupted prompt, answers and wrong answers. Pairs whose lengths
            differ, or whose answers do not, are drawn again.
        n: Pairs.
        name: Of the task.
        seed: Of the draws.
        bos: See `from_pairs`.

    Raises:
        ValueError: Fewer than one pair, or not so many were found; with what was wrong with others.
    """
    check_count(n)
    draws = random.Random(seed)
    groups: dict[int, list[tuple[str, str, Answer, Answer]]] = {}
    seen, refused = set(), ""
    for _ in range(200 + 50 * n):
        pair = draw(draws)
        if pair[:2] in seen:
            continue
        seen.add(pair[:2])
        try:
            ids = encode_pair(tokenizer, *pair, bos=bos)[0]
        except ValueError as error:
            refused = refused or f" (refused, for one: {error})"
            continue
        group = groups.setdefault(len(ids), [])
        group.append(pair)
        if len(group) == n:
            clean, corrupted, answers, wrong = zip(*group, strict=True)
            task = from_pairs(tokenizer, clean, corrupted, answers, wrong, name=name, bos=bos)
            task.meta["seed"] = seed
            return task
    most = max(map(len, groups.values()), default=0)
    remedy = "ask for fewer, or make pairs of your own, with from_pairs" + refused
    raise ValueError(message("n", f"at most {most} pairs of {name}", n, remedy))
