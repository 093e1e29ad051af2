"""Calibration data in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEXTS = (".txt", ".md", ".rst")


def read_data(paths: Sequence[str | Path]) -> list[Any]:
    """Return texts, or sequences of token ids.

    Args:
        paths: Files of text, one document each; files of JSON lines, each with ``text`` or
            ``input_ids``; or folders of these.

    Raises:
        FileNotFoundError: A path is not there.
        ValueError: Another kind of file, a line that has neither, both kinds, or nothing at all.
    """
    found: list[Any] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (*_TEXTS, ".jsonl"))
            found += [item for file in files for item in _items(file)]
        else:
            found += _items(path)
    if not found:
        raise ValueError(message("data", "texts or token ids", list(map(str, paths)), "none there"))
    if len({isinstance(item, str) for item in found}) > 1:
        raise ValueError(message("data", "texts or token ids", "both", "give them one by one"))
    return found


def _items(path: Path) -> list[Any]:
    if path.suffix in _TEXTS:
        text = path.read_text(encoding="utf-8")
        return [text] if text.strip() else []
    if path.suffix != ".jsonl":
        remedy = f"files end in {', '.join((*_TEXTS, '.jsonl'))}"
        raise ValueError(message("data", "texts or JSON lines", str(path), remedy))
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: no JSON: {error}") from error
        item = row.get("text", row.get("input_ids")) if isinstance(row, dict) else None
        if not isinstance(item, str | list):
            raise ValueError(f"{path}:{number}: expected text or input_ids, got {line[:60]!r}")
        items.append(item)
    return items
