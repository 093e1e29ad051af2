"""In how many bits differences from the current run are held and multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from shared_kernels.ops.patching import Rounded, combine_norm, delta_linear, quantize_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from pahq.adapters import Adapter
    from pahq.adapters.base import Norm


class Precision(NamedTuple):
    """What differences are rounded to.

    Attributes:
        held: Dtype of what senders and receivers differ by; None for that of the run itself.
        multiplied: Dtype of what weights are multiplied by.
        doubt: How far a metric may be off, in parts of how far rows are from the current run, as
            `pahq.rows.Rows` tells: decisions that this could turn are made again in the precision
            of the run.
    """

    held: torch.dtype | None
    multiplied: torch.dtype | None
    doubt: float


#: ``fp32`` holds all in the precision of the run, which is float32, or float64 for such a model.
PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(None, None, 0.0),
    "bf16-delta": Precision(torch.bfloat16, torch.bfloat16, 0.01),
    "fp8-delta": Precision(torch.bfloat16, torch.float8_e4m3fn, 0.1),
}


class Weights:
    """Weights of a model rounded to some dtype, made once.

    Args:
        adapter: Of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._rounded: dict[tuple, tuple[Tensor, Tensor | None]] = {}
        self._precise: dict[tuple, Tensor] = {}
        self._operands: dict[tuple[str, int], torch.dtype] = {}

    def operand(self, kind: str, layer: int, wanted: torch.dtype) -> torch.dtype:
        """Return what differences are rounded to before a product: float8 has sizes of its own.

        Args:
            kind: ``heads`` or ``mlp``.
            layer: Of them.
            wanted: If sizes are multiples of 16; else bfloat16 takes the place of float8.
        """
        if wanted != torch.float8_e4m3fn:
            return wanted
        if (kind, layer) not in self._operands:
            self._operands[kind, layer] = self._operand(kind, layer)
        return self._operands[kind, layer]

    def _operand(self, kind: str, layer: int) -> torch.dtype:
        adapter = self.adapter
        if kind == "mlp":
            sizes = adapter.feed_forward(layer).inner.shape
        else:
            sizes = adapter.weights(layer, "q")[0].shape[1:]
        fits = all(size % 16 == 0 for size in sizes)
        return torch.float8_e4m3fn if fits else torch.bfloat16

    def hold(self, keys: Iterable[tuple]) -> None:
        """Have weights of the head in question at hand while others are streamed, and no others.

        Args:
            keys: Of `times`.
        """
        if self.adapter.streamer is not None:
            self._precise = {key: self._read(key).to(self.adapter.dtype, copy=True) for key in keys}

    def times(self, key: tuple, delta: Rounded, out: Tensor | None = None) -> Tensor:
        """Return ``delta W^T``, ``(..., O)``, in the precision of the delta.

        Args:
            key: Of a weight ``(O, I)``: ``("q", layer, head)``, ``("output", layer, head)``,
                ``("inner", layer)``, ``("outer", layer)``.
            delta: ``(..., I)``.
            out: Where to write it, ``(..., O)``; else float8 gives bfloat16, and all others their
                own dtype.
        """
        values, scale = delta
        weight, weight_scale = self.ready(key, values.dtype)
        return delta_linear(values, weight, scale=scale, weight_scale=weight_scale, out=out)

    def ready(self, key: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return a weight in some dtype, and the scales of float8."""
        if (key, dtype) in self._rounded:
            return self._rounded[key, dtype]
        if dtype == self.adapter.dtype and key in self._precise:
            return self._precise[key], None
        weight = self._read(key)
        if dtype == torch.float8_e4m3fn:
            found = quantize_rows(weight.to(self.adapter.dtype))
        else:
            found = weight.to(dtype), None
        # wider ones would be as large as the model, and are needed now and then
        if dtype.itemsize < weight.dtype.itemsize:
            self._rounded[key, dtype] = found
        return found

    def _read(self, key: tuple) -> Tensor:
        kind, layer = key[:2]
        self.adapter.load(layer)
        if kind == "output":
            return self.adapter.output(layer)[0][key[2]]
        if kind in ("q", "k", "v"):
            return self.adapter.weights(layer, kind)[0][key[2]]
        block = self.adapter.feed_forward(layer)
        if kind == "outer":
            return block.outer
        return block.inner if block.gate is None else torch.cat([block.gate, block.inner])


def behind(
    norm: Norm | None, x: Tensor, change: Tensor, dtype: torch.dtype | None = None
) -> Rounded:
    """Return how much a norm's output changes, without what cancels, ``(M, tokens, D)``.

    Args:
        norm: None for the change itself.
        x: ``(tokens, D)``, what goes in.
        change: ``(M, tokens, D)``, what is added to it.
        dtype: Of the result; that of x by default.
    """
    whole = torch.arange(2, dtype=torch.int32, device=x.device)
    kind, weight, eps = ("none", None, 0.0) if norm is None else norm.scaling(x)
    found = combine_norm(
        x[None], change[None], change.new_empty(0, *change.shape), whole, whole[:1],
        weight=weight, kind=kind, eps=eps, dtype=dtype or x.dtype,
    )  # fmt: skip
    return Rounded(found.values[0], None if found.scale is None else found.scale[0])
