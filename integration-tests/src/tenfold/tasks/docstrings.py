"""Real text that every machine with Python has: the docstrings of the standard library.

Each docstring is one piece of text, as a user's message would be; a byte is a token. The text is
under the licence of Python (PSF-2.0) and is read where it is installed.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path

LENGTH = 48
"""Bytes kept of each docstring."""

PADDING = 0
VOCABULARY = 256

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_LEAST = 24


def load() -> tuple[list[bytes], list[bytes]]:
    """Return training texts and held-out texts, a tenth of all; no text is in both.

    The split depends on each text alone.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            found.update(_docstrings(path))
    texts = sorted(found)
    held = [text for text in texts if hashlib.sha256(text).digest()[0] < 26]
    out = set(held)
    return [text for text in texts if text not in out], held


def _docstrings(path: Path) -> list[bytes]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # A few files of the library are there to be wrong.
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    encoded = [" ".join(text.split()).encode()[:LENGTH] for text in texts if text]
    return [text for text in encoded if len(text) >= _LEAST]


def batch(texts: list[bytes]) -> dict:
    """Return ``input_ids`` and ``labels``, (texts, LENGTH) int64; padding is not learned."""
    import torch

    ids = torch.full((len(texts), LENGTH), PADDING)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text))
    return {"input_ids": ids, "labels": ids.masked_fill(ids == PADDING, -100)}
