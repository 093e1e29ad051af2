"""Quantised tensors, read as bfloat16 a part at a time.

FP8 in blocks, as DeepSeek-V3 is released: a matrix in float8 and ``weight_scale_inv``, a number for
each block, such as 128 x 128; the last blocks of a row or column may be narrower. And MXFP4, as
GPT-OSS is: two numbers of four bits in a byte, 32 of them with a power of two, and experts lie the
other way around.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

from slimmoe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from slimmoe.weights import Weights

_FP8, _SCALE, _BLOCKS, _SCALES = torch.float8_e4m3fn, "_scale_inv", "_blocks", "_scales"
#: Values of four bits, E2M1.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODES = torch.tensor([*_HALF, *(-value for value in _HALF)])
#: Numbers that have a power of two in common.
_GROUP = 32


class Dequantized:
    """Weights whose quantised tensors are bfloat16; the others stay as they are.

    Args:
        weights: As they are in files.
        quantization: ``quantization_config`` of ``config.json``.

    Raises:
        UnsupportedModelError: Another method, or tensors that do not belong together.
    """

    def __init__(self, weights: Weights, quantization: Mapping[str, Any]) -> None:
        self._weights = weights
        method = quantization.get("quant_method")
        if method not in ("fp8", "mxfp4"):
            remedy = "load the model with its own library, and save it dequantised"
            raise UnsupportedModelError(message("quant_method", "fp8 or mxfp4", method, remedy))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names = list(weights)
        if method == "fp8":
            self._fp8(quantization.get("weight_block_size"))
        else:
            self._mxfp4()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes.get(name) or self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return torch.bfloat16 if name in self._shapes else self._weights.dtype(name)

    def read(self, name: str, index: Any = ...) -> Tensor:
        """Return a tensor, or the part of it that an index gives."""
        if name not in self._shapes:
            return self._weights.read(name, index)
        shape = self._shapes[name]
        given = () if index is ... else index if isinstance(index, tuple) else (index,)
        parts = (*given, *[slice(None)] * (len(shape) - len(given)))
        return self._of_mxfp4(name, parts) if self._block is None else self._of_fp8(name, parts)

    # --- FP8 -------------------------------------------------------------------------------------

    def _fp8(self, block: Any) -> None:
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(block):
            remedy = "one scale for each tensor is not known"
            raise UnsupportedModelError(message("weight_block_size", "two sizes", block, remedy))
        self._block: tuple[int, int] | None = (int(block[0]), int(block[1]))
        weights, there = self._weights, set(self._names)
        for name in [n for n in self._names if n.endswith(_SCALE)]:
            self._names.remove(name)
            of = name.removesuffix(_SCALE)
            if of not in there:
                raise UnsupportedModelError(f"{name}: it scales {of}, which is not there")
            if weights.dtype(of) != _FP8:
                remedy = f"{name} scales it"
                raise UnsupportedModelError(
                    message(of, "float8_e4m3fn", str(weights.dtype(of)), remedy)
                )
            shape = weights.shape(of)
            *lead, rows, columns = shape
            grid = (*lead, -(-rows // self._block[0]), -(-columns // self._block[1]))
            _check(name, grid, weights.shape(name))
            self._shapes[of] = shape
        for name in self._names:
            if weights.dtype(name) == _FP8 and name not in self._shapes:
                raise UnsupportedModelError(f"{name}: expected scales {name}{_SCALE}, got none")

    def _of_fp8(self, name: str, index: tuple[Any, ...]) -> Tensor:
        assert self._block is not None
        values, scale = self._weights.read(name, index), self._weights.read(name + _SCALE).float()
        shape = self._shapes[name]
        sizes = (*[1] * (len(shape) - 2), *self._block)
        for dim in reversed(range(len(shape))):
            place = torch.arange(shape[dim])[index[dim]] // sizes[dim]
            scale = (
                scale.select(dim, int(place)) if not place.ndim else scale.index_select(dim, place)
            )
        return (values.float() * scale).to(torch.bfloat16)

    # --- MXFP4 -----------------------------------------------------------------------------------

    def _mxfp4(self) -> None:
        self._block = None
        weights, there = self._weights, set(self._names)
        for name in [n for n in self._names if n.endswith(_BLOCKS)]:
            of = name.removesuffix(_BLOCKS)
            if of + _SCALES not in there:
                raise UnsupportedModelError(f"{name}: expected scales {of}{_SCALES}, got none")
            experts, outer, groups, size = weights.shape(name)
            _check(name, (experts, outer, groups, _GROUP // 2), (experts, outer, groups, size))
            _check(of + _SCALES, (experts, outer, groups), weights.shape(of + _SCALES))
            self._shapes[of] = (experts, groups * _GROUP, outer)
            self._names[self._names.index(name)] = of
            self._names.remove(of + _SCALES)

    def _of_mxfp4(self, name: str, index: tuple[Any, ...]) -> Tensor:
        expert, inner, outer = index
        size = self._shapes[name][1]
        # whole groups that the wanted numbers are in
        begin, end = (inner, inner + 1) if isinstance(inner, int) else inner.indices(size)[:2]
        first = begin // _GROUP
        groups = slice(first, max(first, -(-end // _GROUP)))
        parts = [self._weights.read(name + part, (expert, outer, groups))
                 for part in (_BLOCKS, _SCALES)]  # fmt: skip
        inside = inner - first * _GROUP if isinstance(inner, int) else slice(
            begin - first * _GROUP, max(begin, end) - first * _GROUP
        )  # fmt: skip
        found = decoded_mxfp4(*parts)[..., inside]
        if isinstance(inner, int) or isinstance(outer, int):
            return found
        return found.transpose(-1, -2).contiguous()


def decoded_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return numbers ``(..., 32 G)`` in bfloat16, as they lie in files.

    Args:
        blocks: uint8 ``(..., G, 16)``, the lower four bits first.
        scales: uint8 ``(..., G)``, powers of two, 127 more than they are.
    """
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    powers = torch.exp2(scales.float() - 127)
    return (_CODES[codes] * powers[..., None]).to(torch.bfloat16).flatten(-2)


def _check(name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
    if tuple(found) != wanted:
        remedy = "as its blocks are; these files do not belong together"
        raise UnsupportedModelError(message(name, f"shape {wanted}", tuple(found), remedy))
