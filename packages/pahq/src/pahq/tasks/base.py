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

_TEXTS = ("clean", "corrupted")


@dataclass
class Task:
    """N pairs of prompts.

    Prompts of different length are padded on the right, where no token that counts can see it if
    attention is causal.

    Attributes:
        clean: int64 ``(N, T)``.
        corrupted: int64 ``(N, T)``.
        positions: int64 ``(N,)``, the token of each prompt whose logits count.
        answers: int64 ``(N,)``, the token that follows the clean prompt, or ``(N, A)``, those that
            may follow it, -1 behind them in rows that have fewer.
        wrong_answers: Alike, those that follow the corrupted prompt, with an A of their own; None
            if there are none that say something.
        meta: What it is of: name, seed, texts.

    Raises:
        TypeError: Tokens or positions that are not int64.
        ValueError: No pair, shapes that do not fit, a position behind the prompts, an example
            without answers, with one twice, or with one that is right and wrong, by number.
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
        sets = {"answers": self.answers}
        if self.wrong_answers is not None:
            sets["wrong_answers"] = self.wrong_answers
        tensors = {"clean": self.clean, "corrupted": self.corrupted, "positions": self.positions}
        for name, found in (tensors | sets).items():
            wanted = shape if name in _TEXTS else shape[:1]
            # of a set of answers only the first dimension is given
            size = tuple(found.shape)[: 1 if name in sets and 1 <= found.ndim <= 2 else None]
            if size != wanted:
                remedy = "clean and corrupted prompts must have as many tokens, one by one"
                raise ValueError(message(name, f"shape {wanted}", tuple(found.shape), remedy))
        for name, found in (tensors | sets).items():
            if found.dtype != torch.int64:
                raise TypeError(message(name, "int64", found, "convert it with .long()"))
        outside = (self.positions < 0) | (self.positions >= shape[1])
        if outside.any():
            row = _first(outside)
            remedy = "a position counts from 0"
            expected = f"positions below {shape[1]}"
            got = f"{int(self.positions[row])} in example {row}"
            raise ValueError(message("positions", expected, got, remedy))
        for name, found in sets.items():
            _check_set(name, found)
        if self.wrong_answers is not None:
            right, wrong = (x.reshape(shape[0], -1) for x in sets.values())
            same = (right[:, :, None] == wrong[:, None]) & (right >= 0)[:, :, None]
            if same.any():
                row = _first(same.flatten(1).any(1))
                token = int(right[row][same[row].any(1)][0])
                remedy = "nothing tells them apart; leave the example out"
                raise ValueError(
                    message("wrong_answers", "other tokens than the answers",
                            f"the same token {token} in example {row}", remedy)
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
        """Return some of the pairs, with their texts."""
        index = torch.as_tensor(list(rows))
        wrong = self.wrong_answers
        meta = {
            key: [value[row] for row in rows] if key in _TEXTS else value
            for key, value in self.meta.items()
        }
        return Task(
            self.clean[index], self.corrupted[index], self.positions[index], self.answers[index],
            None if wrong is None else wrong[index], meta,
        )  # fmt: skip


def _first(rows: Tensor) -> int:
    return int(rows.nonzero()[0, 0])


def _check_set(name: str, tokens: Tensor) -> None:
    rows = tokens.reshape(len(tokens), -1)
    bare = ~(rows >= 0).any(1)
    if bare.any():
        remedy = "give it one, or leave the example out; -1 only fills rows up"
        got = f"none in example {_first(bare)}"
        raise ValueError(message(name, "a token in each example", got, remedy))
    ordered = rows.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    if twice.any():
        row = _first(twice)
        remedy = "it would count twice"
        got = f"{rows[row].tolist()} in example {row}"
        raise ValueError(message(name, "every token once in an example", got, remedy))
