"""What one use of a layer leaves behind in the backward pass, and what can be made of it.

A record holds what per-unit gradients are made of, not the gradients: an input and an output
gradient for a matrix, tokens and an output gradient for a table. Gradients per unit exist only
where they are as small as a norm layer's.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.dp import (
    certified_norm,
    embedding_accumulate,
    gram_error_bound,
    segment_gram_clip,
    segment_gram_norm,
    segment_mm_clip,
    segment_mm_norm,
    segment_scaled_mm,
    segment_sums,
    segment_token_gram_norm,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from flashdp.units import Units

__all__ = ["MatrixRecord", "RowsRecord", "TableRecord", "inner_product", "join"]


@dataclass
class MatrixRecord:
    """Input and output gradient of a matrix product.

    Attributes:
        a: Input (tokens, d).
        g: Gradient of the output (tokens, p), padding rows zero.
        cu: int32 (units + 1,), tokens before each unit.
        per_row: Tokens of a row.
        transposed: Whether the weight is (d, p) and not (p, d).
        weight: Name of the weight in the module.
        bias: Name of the bias.
    """

    a: Tensor
    g: Tensor
    cu: Tensor
    per_row: int
    transposed: bool = False
    weight: str = "weight"
    bias: str = "bias"

    def _out(self, sums: Mapping[str, Tensor]) -> Tensor:
        total = sums[self.weight]
        return total.t() if self.transposed else total

    def norm2(self, names: Sequence[str], units: Units, strategy: str) -> Tensor:
        """Squared norm of each unit's gradient of the named parameters, (units,)."""
        if self.weight not in names:
            return segment_sums(self.g, self.cu).square().sum(1)
        bias = self.bias in names
        if strategy == "gram":
            n2, absolute = segment_gram_norm(
                self.a, self.g, self.cu, bias=bias, max_seqlen=units.longest * self.per_row
            )
            return certified_norm(n2, absolute, self.cu, self.a.shape[1], self.g.shape[1])
        return segment_mm_norm(
            self.a, self.g, self.cu, bias=bias, row_multiple=max(1, self.per_row)
        )

    def accumulate(self, names: Sequence[str], scale: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add every unit's gradient times its scale."""
        bias = sums[self.bias] if self.bias in names else None
        if self.weight in names:
            segment_scaled_mm(
                self.a, self.g, self.cu, scale, self._out(sums), bias_out=bias,
                row_multiple=max(1, self.per_row),
            )  # fmt: skip
        elif bias is not None:
            bias += _weighted(segment_sums(self.g, self.cu), scale)

    def clip(
        self,
        names: Sequence[str],
        units: Units,
        threshold: Tensor,
        clipping: str,
        stability: float,
        sums: Mapping[str, Tensor],
        strategy: str,
        *,
        fresh: bool = False,
    ) -> Tensor:
        """Norms, factors and weighted sum in one go; returns the squared norms.

        With ``fresh`` the weight's sum is unwritten memory (only where the strategy is "spill").
        """
        out = self._out(sums)
        arguments = (self.a, self.g, self.cu, threshold.to(out.dtype), out)
        options: dict[str, Any] = {
            "bias_out": sums[self.bias] if self.bias in names else None,
            "clipping": clipping,
            "stability": stability,
            "max_seqlen": units.longest * self.per_row,
        }
        if strategy == "gram":
            return segment_gram_clip(*arguments, row_multiple=max(1, self.per_row), **options)
        return segment_mm_clip(*arguments, equal=units.single, accumulate=not fresh, **options)


@dataclass
class TableRecord:
    """Tokens and output gradient of a table lookup.

    Attributes:
        tokens: int64 (tokens,).
        g: Gradient of the rows looked up (tokens, h), padding rows zero.
        cu: int32 (units + 1,), tokens before each unit.
        per_row: Tokens of a row.
        weight: Name of the table in the module.
    """

    tokens: Tensor
    g: Tensor
    cu: Tensor
    per_row: int
    weight: str = "weight"

    def norm2(self, names: Sequence[str], units: Units, strategy: str) -> Tensor:
        """Squared norm of each unit's gradient, (units,)."""
        n2, absolute = segment_token_gram_norm(
            self.tokens, self.g, self.cu, max_seqlen=units.longest * self.per_row
        )
        return certified_norm(n2, absolute, self.cu, 0, self.g.shape[1])

    def accumulate(self, names: Sequence[str], scale: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add every unit's gradient times its scale."""
        embedding_accumulate(self.tokens, self.g, self.cu, scale, sums[self.weight])


@dataclass
class RowsRecord:
    """Gradients themselves, one per row, of parameters small enough for that.

    Attributes:
        name: Name of the parameter in the module.
        g: (rows, *shape).
        cu: int32 (units + 1,), rows before each unit.
    """

    name: str
    g: Tensor
    cu: Tensor

    @functools.cached_property
    def per_unit(self) -> Tensor:
        """(units, elements) in float32 or wider."""
        return segment_sums(self.g.flatten(1), self.cu)

    def norm2(self, names: Sequence[str], units: Units, strategy: str) -> Tensor:
        """Squared norm of each unit's gradient, (units,)."""
        return self.per_unit.square().sum(1)

    def accumulate(self, names: Sequence[str], scale: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add every unit's gradient times its scale."""
        total = sums[self.name]
        total += _weighted(self.per_unit, scale).view_as(total)


def _weighted(per_unit: Tensor, scale: Tensor) -> Tensor:
    # A unit that is left out may hold NaN, and zero times NaN would not leave it out.
    kept = torch.where(scale[:, None] == 0, 0, per_unit)
    return scale.to(kept.dtype) @ kept


def inner_product(records: Sequence[Any], units: Units) -> Tensor | None:
    """Return an upper bound on <head, table>, float64 (units,), of a matrix that is a table too.

    The head's gradient is ``sum_s g_s a_s^T`` and the table's ``sum_t e(x_t) h_t^T``, so that their
    inner product is ``sum_{s,t} g_s[x_t] <a_s, h_t>``: no more than its rounding above the value.

    Returns:
        None where the records are not one of each.
    """
    kinds = {type(record): record for record in records}
    head, table = kinds.get(MatrixRecord), kinds.get(TableRecord)
    if len(records) != 2 or head is None or table is None or head.transposed:
        return None
    sums = [head.a.new_zeros(0, 2, dtype=torch.float64)]
    for (s, t), (first, last) in zip(_spans(head, units), _spans(table, units), strict=True):
        # In float64, which no setting turns into TF32.
        terms = head.a[s:t].double() @ table.g[first:last].double().t()
        terms *= head.g[s:t].index_select(1, table.tokens[first:last]).double()
        sums.append(torch.stack([terms.sum(), terms.abs().sum()])[None])
    product, absolute = torch.cat(sums).unbind(1)
    return product + gram_error_bound(absolute, head.cu, head.a.shape[1], 0)


def _spans(record: MatrixRecord | TableRecord, units: Units) -> list[tuple[int, int]]:
    """Return each unit's first token and the one after its last."""
    if units.single and units.row_dims == 1:
        size = record.per_row
        return [(k * size, (k + 1) * size) for k in range(units.rows)]
    # On a GPU this waits.
    return list(itertools.pairwise(record.cu.tolist()))


def join(records: Sequence[MatrixRecord | TableRecord | RowsRecord]) -> list:
    """Merge several uses of one layer, whose gradients add up within each unit.

    For a matrix or a table, a unit's uses are so many more tokens; of rows the gradients add.
    """
    merged: list = []
    for kind in (MatrixRecord, TableRecord):
        same = [r for r in records if isinstance(r, kind)]
        merged += same if len(same) < 2 else [_more_tokens(same)]
    by_name: dict[str, list[RowsRecord]] = {}
    for record in records:
        if isinstance(record, RowsRecord):
            by_name.setdefault(record.name, []).append(record)
    for same in by_name.values():
        total = sum(r.g.to(torch.promote_types(r.g.dtype, torch.float32)) for r in same[1:])
        merged.append(
            same[0] if len(same) < 2 else RowsRecord(same[0].name, same[0].g + total, same[0].cu)
        )
    return merged


def _more_tokens(records: list) -> MatrixRecord | TableRecord:
    per_row = sum(r.per_row for r in records)

    def cat(tensors: list[Tensor]) -> Tensor:
        dtype = tensors[0].dtype
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        rows = [
            t.to(dtype).view(-1, r.per_row, *t.shape[1:])
            for t, r in zip(tensors, records, strict=True)
        ]
        return torch.cat(rows, 1).flatten(0, 1)

    first = records[0]
    cu = first.cu // first.per_row * per_row
    g = cat([r.g for r in records])
    if isinstance(first, MatrixRecord):
        return MatrixRecord(
            cat([r.a for r in records]), g, cu, per_row, first.transposed, first.weight, first.bias
        )
    return TableRecord(cat([r.tokens for r in records]), g, cu, per_row, first.weight)
