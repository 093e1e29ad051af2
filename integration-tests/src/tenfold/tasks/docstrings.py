"""Real text that every machine with Python has: the docstrings of the standard library.

Each docstring is one document, as a user's message would be. The text is under the licence of
Python (PSF-2.0) and is read where it is installed, so it differs a little between Python versions.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

LEAST = 24
"""Bytes that a document has at least."""

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def load(files: int | None = None) -> tuple[list[str], list[str]]:
    """Return training and held-out documents, a tenth of all, each with its spaces collapsed.

    No document is in both; on which side it is depends on its text alone, and so does its place
    there, which no alphabet decides.

    Args:
        files: Read so many files only, the first of the alphabet.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: set[str] = set()
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(root).parts)
    ]
    for path in paths[:files]:
        found.update(_docstrings(path))
    digests = {hashlib.sha256(text.encode()).digest(): text for text in found}
    texts = [(digest, digests[digest]) for digest in sorted(digests, key=lambda d: d[::-1])]
    training = [text for digest, text in texts if digest[0] >= 26]
    return training, [text for digest, text in texts if digest[0] < 26]


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # A few files of the library are there to be wrong.
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    collapsed = [" ".join(text.split()) for text in texts if text]
    return [text for text in collapsed if len(text.encode()) >= LEAST]


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[list[int]]:
    """Return each document's tokens between the tokenizer's two marks, cut to ``length`` tokens.

    Args:
        texts: Documents.
        tokenizer: Any that has marks for a beginning and an end.
        length: Tokens kept at most, of the marks too.
    """
    marked = [f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" for text in texts]
    found: Any = tokenizer(marked, add_special_tokens=False, truncation=True, max_length=length)
    return found["input_ids"]


def batch(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return ``input_ids`` and ``labels``, (rows, longest) int64; filling is not learned.

    A causal model needs no mask for it: nothing stands behind it.
    """
    import torch

    longest = max((len(row) for row in rows), default=1)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = labels[k, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return {"input_ids": ids, "labels": labels}
