"""What each training sample did to what was asked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from shared_kernels.checkpoint import TensorInfo, replacing_folder, write_safetensors
from shared_kernels.files import write_text
from torch import Tensor

if TYPE_CHECKING:
    import os

_FORMAT, _VERSION = "sam-if-scores", 1
_TENSORS, _RECORD = "scores.safetensors", "scores.json"


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each query would rise if a training sample were removed.

    Where the query is a loss, a positive score is of a sample that helped.

    Attributes:
        values: ``(Q, n)``, in the order of queries and of the training data.
        method: That made them.
        residuals: Of each query's linear system, ``|A y - b| / |b|``; empty where there is none.
        warnings: Why they may not be what retraining gives.
    """

    values: Tensor
    method: str
    residuals: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def reliable(self) -> bool:
        """Whether there is no warning."""
        return not self.warnings

    def top(self, k: int, query: int = 0, *, harmful: bool = False) -> list[tuple[int, float]]:
        """Return the samples that helped most, or harmed most, with their scores.

        Args:
            k: How many, at most.
            query: Whose.
            harmful: Those whose removal lowers the query.
        """
        row = self.values[query]
        order = row.argsort(descending=not harmful, stable=True)[:k]
        return [(int(sample), float(row[sample])) for sample in order]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new folder of safetensors and JSON, which appears when it is complete.

        Raises:
            FileExistsError: The folder exists and is not empty.
        """
        values = self.values.detach().cpu().contiguous()
        record: dict[str, Any] = {
            "format": _FORMAT, "version": _VERSION, "convention": "effect_of_removal",
            "method": self.method, "residuals": self.residuals, "warnings": self.warnings,
        }  # fmt: skip
        with replacing_folder(folder) as new:
            info = TensorInfo("values", values.dtype, tuple(values.shape))
            write_safetensors(new / _TENSORS, [info], [values])
            write_text(new / _RECORD, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: They are no scores, or of another version.
        """
        from safetensors.torch import load_file

        record = json.loads((Path(folder) / _RECORD).read_text(encoding="utf-8"))
        found = (record.get("format"), record.get("version"))
        if found != (_FORMAT, _VERSION):
            remedy = "made by another program or version"
            raise ValueError(message("folder", f"{_FORMAT} {_VERSION}", found, remedy))
        values = load_file(Path(folder) / _TENSORS)["values"]
        return cls(values, record["method"], record["residuals"], record["warnings"])

    def mean(self) -> Tensor:
        """Return the mean over queries, ``(n,)``."""
        return self.values.mean(0)

    def __add__(self, other: Scores) -> Scores:
        """Join queries of the same training data."""
        if self.method != other.method or self.values.shape[1] != other.values.shape[1]:
            expected = f"scores of {self.method} for {self.values.shape[1]} samples"
            got = f"{other.method}, {other.values.shape[1]}"
            raise ValueError(message("other", expected, got, "join scores of one kind"))
        return Scores(
            torch.cat([self.values, other.values]), self.method, self.residuals + other.residuals,
            list(dict.fromkeys(self.warnings + other.warnings)),
        )  # fmt: skip
