"""Training again without some samples, each time once, also where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.files import write_text
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

_FORMAT, _VERSION = "sam-if-retrainings", 1
#: How far what is made again may be from what was kept.
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8


class Retrainings:
    """What queries measure behind trainings without some samples, in memory or in a JSON file.

    A file that is there is gone on with. It belongs to the same question if it has as many queries
    and samples, and if the first training in it, which is made again, comes out as it did.

    Args:
        retrain: Trains without samples and returns what queries measure: of their numbers ``(Q,)``,
            or of as many lists of numbers as ``together`` ``(m, Q)``.
        shape: Queries and training samples there are.
        together: Sets of samples that one call takes; None for calls with one set.
        path: Of the file, which is replaced as a whole behind each call.
        progress: Show a bar.

    Raises:
        ValueError: The file belongs to another question, or is none of these.
    """

    def __init__(
        self,
        retrain: Callable[[Any], Any],
        shape: tuple[int, int],
        *,
        together: int | None = None,
        path: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> None:
        if together is not None:
            check_range("together", together, 1, 1 << 31, "as many as memory allows")
        self._retrain, self._shape, self._together = retrain, shape, together
        self._path, self._progress = Path(path) if path else None, progress
        self._kept: dict[tuple[int, ...], list[float]] = {}
        if self._path and self._path.exists():
            self._read(self._path)

    def of(self, removals: Iterable[Iterable[int]]) -> Tensor:
        """Return what queries measure behind each, ``(m, Q)`` in float64.

        Raises:
            ValueError: Numbers that no sample has, or a training that does not return as many
                finite numbers as there are queries.
        """
        keys = [tuple(sorted(int(n) for n in removed)) for removed in removals]
        for key in keys:
            if len(set(key)) != len(key) or not all(0 <= n < self._shape[1] for n in key):
                remedy = "numbers of the training data"
                expected = f"different ones below {self._shape[1]}"
                raise ValueError(message("samples", expected, key[:5], remedy))
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        size = self._together or 1
        with tqdm(total=len(missing), desc="retraining", disable=not self._progress) as bar:
            for begin in range(0, len(missing), size):
                part = missing[begin : begin + size]
                self._kept.update(zip(part, self._made(part), strict=True))
                self._write()
                bar.update(len(part))
        return torch.tensor([self._kept[key] for key in keys], dtype=torch.float64)

    def _made(self, keys: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Train without each of some sets."""
        given = [list(key) for key in keys]
        found = [self._retrain(given[0])] if self._together is None else self._retrain(given)
        rows = [torch.as_tensor(row).detach().double().cpu() for row in found]
        shapes = [tuple(row.shape) for row in rows]
        if shapes != [self._shape[:1]] * len(keys):
            expected = f"{len(keys)} of shape {self._shape[:1]}"
            raise ValueError(message("retrain", expected, shapes, "one number for each query"))
        for key, row in zip(keys, rows, strict=True):
            if not row.isfinite().all():
                remedy = f"training without {list(key[:5])} went astray"
                raise ValueError(message("retrain", "finite numbers", row.tolist()[:3], remedy))
        return [row.tolist() for row in rows]

    def _write(self) -> None:
        if self._path:
            rows = [{"removed": key, "measured": row} for key, row in self._kept.items()]
            document = {"format": _FORMAT, "version": _VERSION, "queries": self._shape[0],
                        "samples": self._shape[1], "retrainings": rows}  # fmt: skip
            write_text(self._path, json.dumps(document) + "\n")

    def _read(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document.get("format"), document.get("version"))
        if found != (_FORMAT, _VERSION):
            remedy = "made by another program or version"
            raise ValueError(message("path", f"{_FORMAT} {_VERSION}", found, remedy))
        got = (document["queries"], document["samples"])
        if got != self._shape:
            remedy = "the file is of another question: choose another path"
            expected = f"{self._shape[0]} queries, {self._shape[1]} samples"
            raise ValueError(message("path", expected, got, remedy))
        kept = {tuple(row["removed"]): row["measured"] for row in document["retrainings"]}
        if kept:
            first = next(iter(kept))
            was, now = (torch.tensor(x) for x in (kept[first], self._made([first])[0]))
            if not torch.allclose(now, was, rtol=_RELATIVE, atol=_ABSOLUTE):
                remedy = (
                    "other data, model, seed or queries than the file's, or training that does "
                    "not repeat itself, whose effects are noise"
                )
                expected = f"what training without {list(first[:5])} gave, {was.tolist()[:3]}"
                raise ValueError(message("path", expected, now.tolist()[:3], remedy))
        self._kept = kept
