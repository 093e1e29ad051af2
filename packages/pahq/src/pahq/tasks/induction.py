"""Random tokens that are repeated (Olsson et al., arXiv:2209.11895)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import check_range, message

from pahq.tasks.pairs import encode, from_ids
from pahq.tasks.sampling import check_count

if TYPE_CHECKING:
    from pahq.tasks.base import Task

_POOL = 4000


def induction(
    tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None, length: int = 24
) -> Task:
    """Make sequences of random tokens that are repeated up to, but without, the last one.

    In the corrupted prompt the first copy is shuffled, so that it has the same tokens, but another
    one stands behind the one that both prompts end with: that one is the wrong answer.

    Args:
        tokenizer: The model's. Tokens are words and parts of words in ASCII, none of them twice.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.
        length: Tokens of a sequence; prompts have ``2 length - 1``, and a BOS token.

    Raises:
        ValueError: Fewer than one pair, sequences shorter than 4, or too few such tokens.
    """
    check_count(n)
    check_range("length", length, 4, 1 << 20, "the repeat must be long enough to be shuffled")
    draws = random.Random(seed)
    special = set(tokenizer.all_special_ids)
    size = len(tokenizer)
    pool = [
        token for token in draws.sample(range(size), min(size, max(_POOL, 4 * length)))
        if token not in special and _plain(tokenizer.decode([token]))
    ]  # fmt: skip
    if len(pool) < length:
        remedy = "ask for shorter sequences"
        raise ValueError(message("tokenizer", f"{length} words", len(pool), remedy))
    first = encode(tokenizer, "", bos)
    clean, corrupted, answers, wrong = [], [], [], []
    for _ in range(n):
        tokens = draws.sample(pool, length)
        *repeated, answer = tokens
        follower = answer
        while follower == answer:
            shuffled = draws.sample(tokens, length)
            # the sequence goes round: behind its last token the repeat begins
            at = shuffled.index(repeated[-1]) + 1
            follower = (shuffled + repeated)[at]
        clean.append([*first, *tokens, *repeated])
        corrupted.append([*first, *shuffled, *repeated])
        answers.append(answer)
        wrong.append(follower)
    task = from_ids(
        clean, corrupted, answers, wrong, name="induction", pad=tokenizer.pad_token_id or 0,
        bos=tokenizer.bos_token_id,
    )  # fmt: skip
    task.meta |= {
        "seed": seed, "bos": bos, "clean": [tokenizer.decode(row) for row in clean],
        "corrupted": [tokenizer.decode(row) for row in corrupted],
    }  # fmt: skip
    return task


def _plain(text: str) -> bool:
    return text.strip().isalnum() and text.isascii()
