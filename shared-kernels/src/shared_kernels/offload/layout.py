"""Where each parameter of a unit lies in the unit's flat buffer.

``main`` holds, for every compute dtype, one padded run of trainable parameters in the store's
codec, then the frozen parameters as they are; ``lo`` holds the second stream of ``bf16x2``. Runs
are padded to whole tiles, so one kernel launch covers a run, and every parameter starts on a
256-byte boundary, so cuBLAS picks the kernels it would pick for a resident weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from shared_kernels.offload.codecs import CODECS, Codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared_kernels.offload.blocks import ParamRef, Unit

__all__ = ["Run", "RunBuffers", "UnitLayout", "layout_unit"]

TILE = 4096
_ALIGN = 256


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Run:
    """Trainable parameters of one compute dtype, laid end to end in whole tiles.

    ``offsets[k]`` is the first element of ``params[k]``; ``numel`` counts padding too.
    """

    codec: Codec
    compute_dtype: torch.dtype
    params: tuple[ParamRef, ...]
    offsets: tuple[int, ...]
    numel: int
    main_byte: int
    lo_byte: int

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Cut a flat compute buffer of at least ``numel`` elements into the parameters' shapes."""
        return [
            flat[o : o + p.numel].view(p.shape)
            for o, p in zip(self.offsets, self.params, strict=True)
        ]


@dataclass(frozen=True)
class RunBuffers:
    """The store's streams of one run: ``main`` (numel,) and, for bf16x2, ``lo`` (numel,)."""

    main: torch.Tensor
    lo: torch.Tensor | None


@dataclass(frozen=True)
class UnitLayout:
    """The flat layout of one unit."""

    unit: Unit
    runs: tuple[Run, ...]
    frozen: tuple[ParamRef, ...]
    frozen_bytes: tuple[int, ...]
    main_nbytes: int
    lo_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.main_nbytes + self.lo_nbytes

    @cached_property
    def signature(self) -> tuple:
        """Equal for units whose buffers can be cut up alike (as the blocks of one model are)."""
        return (
            tuple(
                (r.codec.name, r.compute_dtype, tuple(p.shape for p in r.params)) for r in self.runs
            ),
            tuple((p.shape, p.dtype) for p in self.frozen),
        )

    def run_buffers(self, buffer: torch.Tensor) -> list[RunBuffers]:
        """View a uint8 buffer of ``nbytes`` as the streams of each run."""
        out = []
        for run in self.runs:
            main = _typed(buffer, run.main_byte, run.numel, run.codec.main)
            lo = (
                _typed(buffer, self.main_nbytes + run.lo_byte, run.numel, torch.int16)
                if run.codec.has_lo
                else None
            )
            out.append(RunBuffers(main, lo))
        return out

    def frozen_views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """View the frozen parameters inside a uint8 buffer of ``nbytes``."""
        return [
            _typed(buffer, start, p.numel, p.dtype).view(p.shape)
            for p, start in zip(self.frozen, self.frozen_bytes, strict=True)
        ]

    def write(self, buffer: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """Encode parameter values, by canonical name, into a uint8 buffer of ``nbytes``."""
        for run, streams in zip(self.runs, self.run_buffers(buffer), strict=True):
            for param, start in zip(run.params, run.offsets, strict=True):
                if param.name not in values:
                    continue
                main, lo = run.codec.encode(values[param.name].detach().reshape(-1))
                streams.main[start : start + param.numel].copy_(main)
                if streams.lo is not None and lo is not None:
                    streams.lo[start : start + param.numel].copy_(lo)
        for param, view in zip(self.frozen, self.frozen_views(buffer), strict=True):
            if param.name in values:
                view.copy_(values[param.name].detach())


def _typed(buffer: torch.Tensor, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return buffer[start : start + numel * dtype.itemsize].view(dtype)


def layout_unit(unit: Unit, codec_of: dict[torch.dtype, str] | str) -> UnitLayout:
    """Lay a unit out.

    Args:
        unit: The unit.
        codec_of: Codec name for the trainable parameters, one for all or by compute dtype.
    """
    trainable = [p for p in unit.params if p.trainable]
    frozen = tuple(p for p in unit.params if not p.trainable)
    runs, main_at, lo_at = [], 0, 0
    for dtype in dict.fromkeys(p.dtype for p in trainable):
        codec = CODECS[codec_of if isinstance(codec_of, str) else codec_of[dtype]]
        params = tuple(p for p in trainable if p.dtype is dtype)
        offsets, numel = _offsets(params)
        runs.append(Run(codec, dtype, params, offsets, numel, main_at, lo_at))
        main_at += numel * codec.main.itemsize
        lo_at += numel * 2 if codec.has_lo else 0
    starts = []
    for param in frozen:
        starts.append(main_at)
        main_at = _up(main_at + param.nbytes, _ALIGN)
    return UnitLayout(unit, tuple(runs), frozen, tuple(starts), main_at, lo_at)


def _offsets(params: Sequence[ParamRef]) -> tuple[tuple[int, ...], int]:
    offsets, at = [], 0
    for param in params:
        offsets.append(at)
        at += _up(param.numel, TILE)
    return tuple(offsets), at
