"""Clean and corrupted inputs of equal length, and the answers that tell them apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass
class Task:
    """N pairs of prompts.

    Prompts of different length are padded on the right, where no token that counts can see it.

    Attributes:
        clean: int64 ``(N, T)``.
        corrupted: int64 ``(N, T)``.
        positions: int64 ``(N,)``, the token of each prompt whose logits count.
        answers: int64 ``(N,)``, the token that follows the clean prompt.
        wrong_answers: int64 ``(N,)``, the one that follows the corrupted prompt; None if there is
            none that says something.
        meta: What it is of: name, seed, texts.
    """

    clean: Tensor
    corrupted: Tensor
    positions: Tensor
    answers: Tensor
    wrong_answers: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.clean.shape)
        if len(shape) != 2 or not shape[0] or not shape[1]:
            remedy = "give at least one pair"
            raise ValueError(message("clean", "token ids (N, T)", shape, remedy))
        for name, wanted in (("corrupted", shape), ("positions", shape[:1]), ("answers", shape[:1]),
                             ("wrong_answers", shape[:1])):  # fmt: skip
            found = getattr(self, name)
            if found is not None and tuple(found.shape) != wanted:
                remedy = "clean and corrupted prompts must have as many tokens, one by one"
                raise ValueError(message(name, f"shape {wanted}", tuple(found.shape), remedy))
        if self.wrong_answers is not None:
            same = (self.answers == self.wrong_answers).nonzero()[:, 0].tolist()
            if same:
                remedy = "nothing tells them apart; leave the example out"
                raise ValueError(
                    message("wrong_answers", "other tokens than the answers", f"the same in {same}",
                            remedy)
                )  # fmt: skip

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def fingerprint(self) -> str:
        """Return a hash of all tokens."""
        parts = [self.clean, self.corrupted, self.positions, self.answers]
        if self.wrong_answers is not None:
            parts.append(self.wrong_answers)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.cpu().long().numpy().tobytes())
        return digest.hexdigest()[:16]

    def select(self, rows: Sequence[int]) -> Task:
        """Return some of the pairs."""
        index = torch.as_tensor(list(rows))
        wrong = self.wrong_answers
        return Task(
            self.clean[index], self.corrupted[index], self.positions[index], self.answers[index],
            None if wrong is None else wrong[index], dict(self.meta),
        )  # fmt: skip


def from_pairs(
    tokenizer: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str],
    wrong_answers: Sequence[str] | None = None,
    *,
    name: str = "pairs",
) -> Task:
    """Make a task of texts.

    What counts of an answer is its first token behind the prompt. Answer and wrong answer must
    differ in it: where they share a beginning, put that into the prompt.

    Args:
        tokenizer: The model's.
        clean: N prompts.
        corrupted: As many, each with as many tokens as its clean prompt.
        answers: What follows the clean prompt, with its leading space if it has one.
        wrong_answers: What follows the corrupted one.
        name: Of the task.

    Raises:
        ValueError: A pair of different length, by number and texts; none; answers that are alike.
    """
    lists = {"corrupted": corrupted, "answers": answers}
    if wrong_answers is not None:
        lists["wrong_answers"] = wrong_answers
    for title, texts in lists.items():
        if len(texts) != len(clean):
            raise ValueError(message(title, f"{len(clean)} texts", len(texts), "give one a prompt"))
    rows = [_encode(tokenizer, text) for text in clean]
    others = [_encode(tokenizer, text) for text in corrupted]
    for number, (a, b) in enumerate(zip(rows, others, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"corrupted: expected as many tokens as in the clean prompt, got {len(b)} and "
                f"{len(a)} in example {number} ({corrupted[number]!r} and {clean[number]!r}); "
                "exchange words for ones of as many tokens"
            )
    longest = max(map(len, rows), default=0)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    padded = lambda lines: torch.tensor(  # noqa: E731
        [line + [pad] * (longest - len(line)) for line in lines]
    ).view(len(lines), longest)
    right = [_next(tokenizer, text, ids, answer)
             for text, ids, answer in zip(clean, rows, answers, strict=True)]  # fmt: skip
    wrong = None
    if wrong_answers is not None:
        wrong = torch.tensor(
            [_next(tokenizer, text, ids, answer)
             for text, ids, answer in zip(clean, rows, wrong_answers, strict=True)]
        )  # fmt: skip
    return Task(
        padded(rows), padded(others), torch.tensor([len(row) - 1 for row in rows]),
        torch.tensor(right), wrong,
        {"name": name, "clean": list(clean), "corrupted": list(corrupted)},
    )  # fmt: skip


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _next(tokenizer: Any, text: str, ids: list[int], answer: str) -> int:
    """Return the first token of an answer where it stands."""
    whole = _encode(tokenizer, text + answer)
    if len(whole) <= len(ids) or whole[: len(ids)] != ids:
        raise ValueError(
            f"answers: expected one that begins with a token of its own behind the prompt, got "
            f"{answer!r} behind {text!r}; begin it with a space, or end the prompt without one"
        )
    return whole[len(ids)]
