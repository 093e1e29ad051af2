"""A folder of features and lengths: safetensors shards and a JSON header."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shared_kernels._checks import message
from shared_kernels.files import write_text
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FORMAT = 1
_HEADER = "store.json"
_LABELS = "labels"
SPLITS = {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}


class StoreError(ValueError):
    """A folder holds no features, other ones than asked for, or damaged ones."""


@dataclass(frozen=True)
class Collected:
    """Prompts, G answers to each, and what their model's states were.

    Attributes:
        header: Of the store: model, tokenizer, sampling, template, features.
        prompts: float ``(P, D)`` by the keys of feature specs.
        hashes: int64 ``(P,)``, 63 bits of each prompt's SHA-256.
        families: The kind of each prompt.
        scenarios: The scenario of each prompt.
        prompt_tokens: int64 ``(P,)``.
        lengths: int64 ``(P, G)``, tokens with the end token; of stopped answers those that came.
        censored: bool ``(P, G)``, answers that were stopped.
        step_sample: int64 ``(S,)``, the answer ``p G + g`` of each step.
        step_time: int64 ``(S,)``, tokens that were read then.
        steps: float ``(S, 2 d + 4)``, as `StepFeatures`; None if not loaded.
    """

    header: dict[str, Any]
    prompts: dict[str, Tensor]
    hashes: Tensor
    families: list[str]
    scenarios: list[str]
    prompt_tokens: Tensor
    lengths: Tensor
    censored: Tensor
    step_sample: Tensor
    step_time: Tensor
    steps: Tensor | None

    def __len__(self) -> int:
        return len(self.hashes)

    def select(self, rows: Sequence[int] | Tensor) -> Collected:
        """Return some prompts, with all of their answers."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        siblings = self.lengths.shape[1]
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[rows] = torch.arange(len(rows))
        prompt = self.step_sample // max(1, siblings)
        keep = (place[prompt] >= 0).nonzero()[:, 0]
        sample = place[prompt[keep]] * siblings + self.step_sample[keep] % max(1, siblings)
        chosen = rows.tolist()
        return replace(
            self,
            prompts={key: value[rows] for key, value in self.prompts.items()},
            hashes=self.hashes[rows],
            families=[self.families[row] for row in chosen],
            scenarios=[self.scenarios[row] for row in chosen],
            prompt_tokens=self.prompt_tokens[rows],
            lengths=self.lengths[rows],
            censored=self.censored[rows],
            step_sample=sample,
            step_time=self.step_time[keep],
            steps=None if self.steps is None else self.steps[keep],
        )

    def split(self, name: str, *, by: str = "prompt") -> Collected:
        """Return the prompts of a split, which their hash decides: equal prompts are never apart.

        Args:
            name: ``train`` (70 %), ``validation``, ``calibration`` or ``test`` (10 % each).
            by: ``prompt``, or ``family``: all prompts of a kind fall into one split.

        Raises:
            ValueError: Another name.
        """
        if name not in SPLITS or by not in ("prompt", "family"):
            remedy = "pick one of these, by prompt or by family"
            raise ValueError(message("name", f"one of {list(SPLITS)}", name, remedy))
        bounds, low = {}, 0.0
        for split, share in SPLITS.items():
            bounds[split] = (low, low + share)
            low += share
        low, high = bounds[name]
        if by == "prompt":
            # other bits than those that an index of a hash table would use
            share = ((self.hashes >> 20) % 10_000).double() / 10_000
        else:
            from forelen.fingerprint import digest

            parts = [int(digest(f), 16) % 10_000 / 10_000 for f in self.families]
            share = torch.tensor(parts, dtype=torch.float64)
        return self.select(((share >= low) & (share < high)).nonzero()[:, 0])

    @classmethod
    def join(cls, parts: Sequence[Collected]) -> Collected:
        """Put stores of one model and one sampling together.

        Raises:
            StoreError: They differ in what makes features comparable.
        """
        first = parts[0]
        same = ("model", "tokenizer", "sampling", "features", "num_samples")
        for part in parts[1:]:
            for name in same:
                if part.header[name] != first.header[name]:
                    raise StoreError(
                        f"{name}: expected {first.header[name]!r} as in the first store, got "
                        f"{part.header[name]!r}; collect both alike"
                    )
        offsets = torch.tensor([0, *[part.lengths.numel() for part in parts[:-1]]]).cumsum(0)
        have = all(part.steps is not None for part in parts)
        return cls(
            header=first.header,
            prompts={k: torch.cat([part.prompts[k] for part in parts]) for k in first.prompts},
            families=[family for part in parts for family in part.families],
            scenarios=[scenario for part in parts for scenario in part.scenarios],
            step_sample=torch.cat(
                [p.step_sample + offset for p, offset in zip(parts, offsets, strict=True)]
            ),
            steps=torch.cat([p.steps for p in parts if p.steps is not None]) if have else None,
            **{
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("hashes", "prompt_tokens", "lengths", "censored", "step_time")
            },
        )


class FeatureStore:
    """A folder that holds what `FeatureCollector` found, a shard for each batch of prompts.

    Features tell of their prompts: who can read a store can learn about what was asked. Texts are
    not in it.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def header(self) -> dict[str, Any]:
        """What the store holds, of which model.

        Raises:
            StoreError: No store, or one of another version.
        """
        try:
            found = json.loads((self.path / _HEADER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(
                f"path: expected a folder with {_HEADER}, got {self.path}; make one by "
                "`forelen collect`"
            ) from None
        except json.JSONDecodeError as error:
            raise StoreError(f"path: {self.path / _HEADER} is damaged: {error}") from None
        if found.get("format") != FORMAT:
            raise StoreError(
                f"path: expected a store of format {FORMAT}, got {found.get('format')!r} in "
                f"{self.path}; collect again"
            )
        return found

    def exists(self) -> bool:
        """Return whether there is a header."""
        return (self.path / _HEADER).is_file()

    def open(self, header: Mapping[str, Any]) -> None:
        """Begin, or go on with what was begun with the same header.

        Raises:
            StoreError: The folder holds features of other prompts or settings.
        """
        wanted = {"format": FORMAT, **header}
        if self.exists():
            for name, value in wanted.items():
                if (found := self.header.get(name)) != value:
                    raise StoreError(
                        f"path: {self.path} was begun with {name}={found!r}, not {value!r}; choose "
                        "another folder, or the same settings"
                    )
            return
        write_text(self.path / _HEADER, json.dumps(wanted, indent=1) + "\n")

    def _shard(self, index: int) -> Path:
        return self.path / "shards" / f"{index:06d}.safetensors"

    def has(self, index: int) -> bool:
        """Return whether a shard is there; it is then whole."""
        return self._shard(index).is_file()

    def write(self, index: int, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write a shard so that it is there whole or not at all."""
        target = self._shard(index)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            # one entry: several would be written in any order, and files would differ
            text = {_LABELS: json.dumps(metadata)}
            save_file({k: v.contiguous() for k, v in tensors.items()}, name, metadata=text)
            with Path(name).open("rb") as file:
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self, *, features: Iterable[str] | None = None, steps: bool = True) -> Collected:
        """Read what has been collected.

        Args:
            features: Keys of feature specs; by default all.
            steps: Read the features of answers that have begun, most of the bytes.

        Raises:
            StoreError: No store, nothing in it, a feature it lacks, or numbers that are none.
        """
        header = self.header
        shards = sorted((self.path / "shards").glob("[0-9]*.safetensors"))
        if not shards:
            raise StoreError(f"path: nothing has been collected in {self.path} yet")
        keys = list(header["features"] if features is None else features)
        for key in keys:
            if key not in header["features"]:
                raise StoreError(
                    f"features: expected some of {header['features']}, got {key!r}; collect it"
                )
        parts = [self._read(shard, header, keys, steps) for shard in shards]
        found = Collected.join(parts)
        if not bool((found.lengths >= 1).all()):
            raise StoreError(f"path: {self.path} holds lengths below 1; collect again")
        return found

    def _read(self, path: Path, header: dict[str, Any], keys: list[str], steps: bool) -> Collected:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[_LABELS])
                found = {
                    "prompts": {key: file.get_tensor(f"prompts.{key}") for key in keys},
                    "steps": file.get_tensor("steps") if steps else None,
                    **{
                        name: file.get_tensor(name)
                        for name in (
                            "hashes", "prompt_tokens", "lengths", "censored", "step_sample",
                            "step_time",
                        )
                    },
                }  # fmt: skip
        except Exception as error:
            raise StoreError(
                f"path: {path} is damaged ({error}); delete it and collect again, which makes only "
                "what is missing"
            ) from error
        return Collected(header=header, **metadata, **found)
