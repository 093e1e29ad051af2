"""Pairs of one's own, out of a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pahq.tasks.pairs import from_pairs

if TYPE_CHECKING:
    from pahq.tasks.base import Task


def count_pairs(path: str | Path) -> int:
    """Return how many lines a file has."""
    with Path(path).open(encoding="utf-8") as file:
        return sum(1 for _ in file)


def read_pairs(path: str | Path, tokenizer: Any, first: int, end: int) -> Task:
    """Make a task of some lines of a file.

    Args:
        path: JSON lines with ``clean``, ``corrupted``, ``answer`` and, if all have one,
            ``wrong_answer``.
        tokenizer: The model's.
        first: Line to begin with, from 0.
        end: Line before which it ends.

    Raises:
        ValueError: Any line of the file that is none, by number; or as `from_pairs`.
    """
    with Path(path).open(encoding="utf-8") as file:
        lines = [_pair(path, number, line) for number, line in enumerate(file, 1)]
    chosen = lines[first:end]
    wrong = [line["wrong_answer"] for line in chosen if "wrong_answer" in line]
    return from_pairs(
        tokenizer, *([line[key] for line in chosen] for key in ("clean", "corrupted", "answer")),
        wrong if len(wrong) == len(chosen) else None, name=Path(path).stem,
    )  # fmt: skip


def _pair(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if all(isinstance(found[key], str) for key in ("clean", "corrupted")) and found["answer"]:
            return found
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path} line {number}: expected "
        '{"clean": "...", "corrupted": "...", "answer": " ...", "wrong_answer": " ..."}, '
        f"got {line.strip()[:80]!r}"
    )
