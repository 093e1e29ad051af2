"""Queries and numbers of samples from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

from sam_if.objective import IGNORED

if TYPE_CHECKING:
    import os

    from torch import Tensor


def read_batches(
    path: str | os.PathLike[str], tokenizer: Any = None, *, size: int = 8, max_tokens: int = 512
) -> list[Any]:
    """Read batches of samples from a file.

    ``.safetensors`` has the model's inputs by name, with samples in the first dimension, or inputs
    and labels as ``0`` and ``1``. ``.jsonl`` has a ``text`` in each line, and a ``label`` where it
    is classified.

    Args:
        path: The file.
        tokenizer: For texts; of transformers.
        size: Samples in a batch.
        max_tokens: Longer texts are cut.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Another kind of file, one without samples, texts without a tokenizer, or a line
            that is none.
    """
    place = Path(path)
    if place.suffix == ".safetensors":
        return _tensors(place, size)
    if place.suffix == ".jsonl":
        return _texts(place, tokenizer, size, max_tokens)
    raise ValueError(message("query", "a .safetensors or .jsonl file", place.name, "make one"))


def _tensors(path: Path, size: int) -> list[Any]:
    from safetensors.torch import load_file

    found = load_file(path)
    counts = {len(part) for part in found.values()}
    if len(counts) != 1 or not min(counts):
        remedy = "samples are in the first dimension"
        raise ValueError(message(path.name, "tensors of as many samples", sorted(counts), remedy))
    count = counts.pop()
    starts = range(0, count, size)
    if found.keys() == {"0", "1"}:
        return [(found["0"][n : n + size], found["1"][n : n + size]) for n in starts]
    return [{name: part[n : n + size] for name, part in found.items()} for n in starts]


def _texts(path: Path, tokenizer: Any, size: int, max_tokens: int) -> list[Any]:
    if tokenizer is None:
        remedy = "train with processing_class=, or give tokens in a .safetensors file"
        raise ValueError(message("query", "a tokenizer beside the run, for texts", None, remedy))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((str(row["text"]), row.get("label")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected an object with text") from error
    if not rows:
        raise ValueError(message(path.name, "at least one line", 0, "give texts"))
    return [_batch(rows[n : n + size], tokenizer, max_tokens) for n in range(0, len(rows), size)]


def _batch(rows: list[tuple[str, Any]], tokenizer: Any, max_tokens: int) -> dict[str, Tensor]:
    """Return texts as a model takes them, padded on the right."""
    ids = [tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text, _ in rows]
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    labels = [label for _, label in rows]
    if all(label is None for label in labels):
        wanted = tokens.masked_fill(mask == 0, IGNORED)
    elif any(label is None for label in labels):
        remedy = "give all of them a label, or none"
        raise ValueError(message("query", "labels of all texts", labels[:3], remedy))
    else:
        wanted = torch.tensor(labels)
    return {"input_ids": tokens, "attention_mask": mask, "labels": wanted}


def read_numbers(path: str | os.PathLike[str]) -> list[int]:
    """Read numbers of samples, separated by white space or commas.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Something else is in it.
    """
    words = Path(path).read_text(encoding="utf-8").replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong or not words:
        remedy = "separated by white space or commas"
        got = wrong[:3] if wrong else "nothing"
        raise ValueError(message("ids", "numbers of samples", got, remedy))
    return [int(word) for word in words]
