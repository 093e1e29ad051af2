"""Sums over calibration tokens, which add up over batches, domains and machines."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from shared_kernels._checks import message
from shared_kernels.checkpoint import TensorInfo, replacing_folder, write_safetensors
from shared_kernels.files import write_text
from torch import Tensor

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

VERSION = 1
_FORMAT = "slimmoe-calibration"
_TENSORS = "statistics.safetensors"
_RECORD = "statistics.json"
_HASH_BITS = 256


# What the fields' metadata says of their axes, and how two of them merge.
_E = {"axes": ("E",)}
_H = {"axes": ("H",)}
_MAX_E = {"axes": ("E",), "merge": "max"}
_EE, _EH, _EI = ({"axes": ("E", axis)} for axis in "EHI")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """Sums over tokens. Tensors are float64, in the host's memory.

    Attributes:
        tokens: Tokens that were counted; times the weight after ``scaled``.
    """

    tokens: float

    @classmethod
    def axes(cls) -> dict[str, tuple[str, ...]]:
        """Axes of each tensor: E experts, H channels, I neurons of an expert."""
        fields = dataclasses.fields(cls)
        return {f.name: f.metadata["axes"] for f in fields if "axes" in f.metadata}

    @classmethod
    def maxima(cls) -> set[str]:
        """Names of those tensors that are no sums but maxima."""
        return {f.name for f in dataclasses.fields(cls) if _is_max(f)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self.axes()}

    def __add__(self, other: Self) -> Self:
        merged: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            merged[f.name] = torch.maximum(a, b) if _is_max(f) else a + b
        return type(self)(**merged)

    def scaled(self, weight: float) -> Self:
        """The same with every token counted ``weight`` times; maxima stay."""
        fields = [f for f in dataclasses.fields(self) if not _is_max(f)]
        return dataclasses.replace(self, **{f.name: getattr(self, f.name) * weight for f in fields})


def _is_max(of: Any) -> bool:
    return of.metadata.get("merge") == "max"


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStatistics(Sums):
    """Sums of one MoE layer over tokens and, in all but the last two, over their selected experts.

    With w the exact weight that the model multiplies an expert's output y by and a that which its
    down projection is applied to. From these follow the importances of arXiv:2605.08738, section
    3.2, and of REAP (arXiv:2510.13999).

    Attributes:
        count: ``[E]`` How often an expert was selected.
        weight_sum: ``[E]`` Σ w.
        share_sum: ``[E]`` Σ w / Σ_j w_j, with j over the experts selected for the token.
        norm_sum: ``[E]`` Σ ‖y‖₂; y is before weighting.
        weighted_norm_sum: ``[E]`` Σ w ‖y‖₂.
        norm_max: ``[E]`` max ‖y‖₂; 0 for an expert that was never selected.
        output_sum: ``[E, H]`` Σ y.
        activation_sum: ``[E, I]`` Σ |a|.
        logit_gram: ``[E, E]`` Z'Z of the router's logits Z ``[tokens, E]``.
        probability_sum: ``[E]`` Σ softmax(z), over all tokens: what is lost from the softmax's
            denominator when an expert is dropped.
    """

    count: Tensor = field(metadata=_E)
    weight_sum: Tensor = field(metadata=_E)
    share_sum: Tensor = field(metadata=_E)
    norm_sum: Tensor = field(metadata=_E)
    weighted_norm_sum: Tensor = field(metadata=_E)
    norm_max: Tensor = field(metadata=_MAX_E)
    output_sum: Tensor = field(metadata=_EH)
    activation_sum: Tensor = field(metadata=_EI)
    logit_gram: Tensor = field(metadata=_EE)
    probability_sum: Tensor = field(metadata=_E)


@dataclass(frozen=True, kw_only=True, eq=False)
class NormStatistics(Sums):
    """Sums of one norm of the residual stream (arXiv:2605.08738, width pruning).

    Attributes:
        output_abs_sum: ``[H]`` Σ |Norm(x)|.
        input_square_sum: ``[H]`` Σ x².
    """

    output_abs_sum: Tensor = field(metadata=_H)
    input_square_sum: Tensor = field(metadata=_H)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics(Sums):
    """Sum of the residual stream after a layer, or after the embeddings.

    Attributes:
        output_sum: ``[H]``; over ``tokens`` it is the a_l of arXiv:2605.08738, appendix A.4.
    """

    output_sum: Tensor = field(metadata=_H)


_S = TypeVar("_S", bound=Sums)


class LayerCoverage(NamedTuple):
    """How well the data reached the experts of a layer.

    Attributes:
        never_selected: Experts that no token was routed to.
        least_count: Selections of the least selected expert.
        mean_count: Mean selections of an expert.
    """

    never_selected: tuple[int, ...]
    least_count: float
    mean_count: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationStatistics:
    """What `calibrate` measured. Layer indices are those of the model it was measured on.

    ``a + b`` is what one calibration on both data sets gives, but for rounding. Metadata says how
    much was run, and is not changed by ``scaled``.

    Attributes:
        model_type: As in the model's configuration.
        config_sha256: Hash of the configuration, without names, dtypes and versions.
        dtype: Of the model while it was run, such as ``bfloat16``.
        tokens: Counted tokens; padding and excluded tokens do not count.
        sequences: Sequences that were run.
        batches: Batches that were run.
        tokens_sha256: Sum modulo 2²⁵⁶ of the SHA-256 of each sequence's token ids (little-endian
            int64, without padding), in hexadecimal: the same however the sequences were ordered,
            batched, or spread over calibrations that were added up.
        experts: By index of layer, where it has experts.
        norms: By the norm's name in the checkpoint, such as ``model.layers.0.input_layernorm``.
        layers: By index of layer.
        embedding: Of what enters layer 0.
    """

    model_type: str
    config_sha256: str
    dtype: str
    tokens: int
    sequences: int
    batches: int
    tokens_sha256: str
    experts: Mapping[int, ExpertStatistics]
    norms: Mapping[str, NormStatistics]
    layers: Mapping[int, LayerStatistics]
    embedding: LayerStatistics
    version: int = VERSION

    def parts(self) -> Iterator[tuple[str, Sums]]:
        """All sums with the names that they are stored under."""
        yield from ((f"experts.{index}", part) for index, part in self.experts.items())
        yield from ((f"norms.{name}", part) for name, part in self.norms.items())
        yield from ((f"layers.{index}", part) for index, part in self.layers.items())
        yield "embedding", self.embedding

    def coverage(self) -> dict[int, LayerCoverage]:
        """Which experts the data did not reach, by index of layer."""
        found = {}
        for index, part in self.experts.items():
            count = part.count
            never = tuple(torch.nonzero(count == 0).flatten().tolist())
            found[index] = LayerCoverage(never, count.min().item(), count.mean().item())
        return found

    def scaled(self, weight: float) -> CalibrationStatistics:
        """The same with every token counted ``weight`` times, to weight domains before adding.

        Raises:
            ValueError: The weight is not positive and finite.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(message("weight", "a positive finite number", weight, "choose one"))
        return self.each(lambda part: part.scaled(weight))

    def each(self, change: Callable[[Any], Any]) -> CalibrationStatistics:
        """The same with all sums changed, in the order of `parts`."""
        return dataclasses.replace(
            self,
            experts={index: change(part) for index, part in self.experts.items()},
            norms={name: change(part) for name, part in self.norms.items()},
            layers={index: change(part) for index, part in self.layers.items()},
            embedding=change(self.embedding),
        )

    def __add__(self, other: CalibrationStatistics) -> CalibrationStatistics:
        for name in ("model_type", "config_sha256", "dtype"):
            a, b = getattr(self, name), getattr(other, name)
            if a != b:
                raise ValueError(
                    message(name, f"{a!r} in both", b, "add statistics of the same model only")
                )
        shapes = [
            {name: {k: v.shape for k, v in part.tensors().items()} for name, part in s.parts()}
            for s in (self, other)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError("the statistics have other layers or sizes; add those of one model")
        hashed = int(self.tokens_sha256, 16) + int(other.tokens_sha256, 16)
        return dataclasses.replace(
            self,
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            batches=self.batches + other.batches,
            tokens_sha256=hexadecimal(hashed),
            experts=_added(self.experts, other.experts),
            norms=_added(self.norms, other.norms),
            layers=_added(self.layers, other.layers),
            embedding=self.embedding + other.embedding,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``statistics.safetensors`` and ``statistics.json`` into a new folder.

        The folder appears when both are complete.

        Raises:
            FileExistsError: The folder exists and is not empty.
        """
        record: dict[str, Any] = {"format": _FORMAT}
        record |= {name: getattr(self, name) for name in _METADATA}
        record["counted"] = {name: part.tokens for name, part in self.parts()}
        tensors = {
            f"{name}.{key}": value
            for name, part in self.parts()
            for key, value in part.tensors().items()
        }
        infos = [TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
        with replacing_folder(folder) as new:
            write_safetensors(new / _TENSORS, infos, tensors.values())
            write_text(new / _RECORD, json.dumps(record, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CalibrationStatistics:
        """Read what `save_pretrained` wrote, bit for bit.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The files are not such statistics, are of another version, or do not
                belong together.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (_RECORD, _TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is not there; give a folder that calibration statistics "
                    "were saved to"
                )
        record = _read_record(folder / _RECORD)
        tensors = load_file(folder / _TENSORS)
        read: dict[str, dict[Any, Any]] = {"experts": {}, "norms": {}, "layers": {}}
        embedding = None
        for name, tokens in record["counted"].items():
            kind, _, key = name.partition(".")
            if kind == "embedding":
                embedding = _part(LayerStatistics, name, tokens, tensors)
            elif kind in read:
                index = key if kind == "norms" else int(key)
                read[kind][index] = _part(_KINDS[kind], name, tokens, tensors)
            else:
                raise ValueError(f"{folder / _RECORD} has statistics of unknown kind {name!r}")
        if tensors or embedding is None:
            wrong = next(iter(tensors), "embedding")
            raise ValueError(f"{_TENSORS} and {_RECORD} in {folder} do not agree on {wrong!r}")
        return cls(**{name: record[name] for name in _METADATA}, embedding=embedding, **read)


_KINDS = {"experts": ExpertStatistics, "norms": NormStatistics, "layers": LayerStatistics}
_METADATA = (
    "version", "model_type", "config_sha256", "dtype", "tokens", "sequences", "batches",
    "tokens_sha256",
)  # fmt: skip


def hexadecimal(hashed: int) -> str:
    """A hash modulo 2²⁵⁶, as 64 digits."""
    return f"{hashed % (1 << _HASH_BITS):064x}"


def _added(a: Mapping[Any, _S], b: Mapping[Any, _S]) -> dict[Any, _S]:
    return {key: part + b[key] for key, part in a.items()}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{path} does not describe calibration statistics")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {record.get('version')}, this slimmoe reads {VERSION}; "
            "calibrate again"
        )
    missing = [name for name in (*_METADATA, "counted") if name not in record]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}")
    return record


def _part(kind: type[_S], name: str, tokens: float, tensors: dict[str, Tensor]) -> _S:
    """Take the tensors of one part out of those of the file."""
    sizes: dict[str, int] = {}
    values = {}
    for key, axes in kind.axes().items():
        value = tensors.pop(f"{name}.{key}", None)
        if value is None:
            raise ValueError(f"{_TENSORS} lacks {name}.{key}")
        agree = value.ndim == len(axes) and all(
            sizes.setdefault(axis, size) == size
            for axis, size in zip(axes, value.shape, strict=True)
        )
        if value.dtype != torch.float64 or not agree:
            raise ValueError(f"{_TENSORS}: {name}.{key} has another dtype or shape than expected")
        values[key] = value
    return kind(tokens=tokens, **values)
