"""The definition of the segment operations in plain torch.

Rows of flat matrices belong to privacy units: unit i holds the rows ``cu_seqlens[i]`` up to
``cu_seqlens[i + 1]``. With its inputs A_i (T_i, d) and output gradients G_i (T_i, p), the gradient
of a linear layer's weight is ``M_i = G_i^T A_i`` and that of its bias ``b_i = sum_t G_i[t]``::

    n2_i = |M_i|^2 (+ |b_i|^2) = sum_{t,s} (<a_t, a_s> (+ 1)) <g_t, g_s>
    S    = sum_i c_i M_i,    c_i = min(1, C / n_i)

Sources: the Gram form of the norm, Goodfellow (arXiv 1510.01799) and Li et al. (ICLR 2022, "ghost
clipping"); one pass per layer, FlashDP (arXiv 2507.01154); the automatic factor, Bu et al. (NeurIPS
2023). Everything is accumulated in float32, or in float64 for float64 inputs.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Elements of Gram matrices, and of products, that are held at a time. Few units in one batch let
#: each core work on its own.
_GRAM_CHUNK, _PRODUCT_CHUNK = 1 << 20, 1 << 22
#: Rows of a block of the Gram matrix.
_GRAM_ROWS = 256
#: Rows that are widened at a time for a product over all rows.
_PRODUCT_ROWS = 8192
#: Elements of the products that are formed, squared and added while they are in a cache.
_CLIP_CHUNK = 1 << 18
#: What a factor is multiplied by, so that rounding does not take a clipped norm over the threshold.
SHRINK = 1 - 2.0**-16
#: What `gram_norm` adds to its absolute values for each pair of rows, times both inner products.
#: Products below 2^-126 are lost in <a_t, a_s> or <g_t, g_s>, at most d or p of them. That is an
#: error of the pair of 2^-126 (d |<g_t, g_s>| + p |<a_t, a_s>|), which no bound of rounding sees;
#: times the (d + p) 5/32 2^-23 of `gram_steps`, 2^-100.3 is enough. Ordinary sums do not move.
LOST = 2.0**-98
#: Units in the last place that tensor cores may cut off a sum, for each of its terms.
DRIFT = 5 / 32


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def ieee_matmul() -> Generator[None]:
    """Multiply float32 matrices in float32, whatever the process allows otherwise."""
    mkldnn: Any = torch.backends.mkldnn  # its stubs know no matmul
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


class Batch(NamedTuple):
    """Consecutive units of one length.

    Attributes:
        units: Which units.
        rows: Their rows.
        count: How many units.
    """

    units: slice
    rows: slice
    count: int

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of these units as ``(count, length, ...)`` in ``dtype``."""
        length = (self.rows.stop - self.rows.start) // self.count
        return x[self.rows].unflatten(0, (self.count, length)).to(dtype)


def unit_bounds(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Return the boundaries of the units, checked.

    Raises:
        ValueError: They do not begin at 0, end at ``rows`` or decrease.
    """
    bounds = cu_seqlens.tolist()
    ordered = all(low <= high for low, high in pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != rows or not ordered:
        raise ValueError(
            f"cu_seqlens: expected 0 first, the number of rows ({rows}) last and no decrease "
            f"between, got {bounds if len(bounds) < 12 else [*bounds[:5], '...', *bounds[-5:]]}; "
            "pass the running sum of the lengths"
        )
    return bounds


def batches(
    cu_seqlens: Tensor, rows: int, product: int | None = None, chunk: int | None = None
) -> Iterator[Batch]:
    """Yield the units that have rows, consecutive ones of equal length together.

    Args:
        cu_seqlens: int32 ``(U + 1,)``.
        rows: Number of rows.
        product: Elements of a unit's product, to bound a batch; None bounds its Gram matrices.
        chunk: What the products of a batch are bounded by, if not by the usual.
    """
    bounds = unit_bounds(cu_seqlens, rows)
    first = 0
    while first < len(bounds) - 1:
        length = bounds[first + 1] - bounds[first]
        if length == 0:
            first += 1
            continue
        if product is None:
            most = _GRAM_CHUNK // (length * min(length, _GRAM_ROWS))
        else:
            most = (chunk or _PRODUCT_CHUNK) // max(1, product)
        limit = min(len(bounds) - 1, first + max(1, most))
        last = first + 1
        while last < limit and bounds[last + 1] - bounds[last] == length:
            last += 1
        yield Batch(slice(first, last), slice(bounds[first], bounds[last]), last - first)
        first = last


def gram_norm(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, bias: bool, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """Sum ``(<a_t, a_s> + bias) <g_t, g_s>`` and its absolute value over pairs of a unit's rows.

    The lower triangle counts twice.
    """
    dtype = accumulate_dtype(g.dtype)
    n2 = g.new_zeros(cu_seqlens.shape[0] - 1, dtype=dtype)
    absolute = torch.zeros_like(n2)
    with ieee_matmul():
        for batch in batches(cu_seqlens, g.shape[0]):
            x, y = batch.of(a, dtype), batch.of(g, dtype)
            for low in range(0, x.shape[1], _GRAM_ROWS):
                high = low + _GRAM_ROWS
                gram = x[:, low:high] @ x[:, :high].mT
                if bias:
                    gram += 1
                outputs = y[:, low:high] @ y[:, :high].mT
                lost = (gram.abs() + outputs.abs()).mul_(LOST)
                gram *= outputs
                _add_triangle(gram, low, n2[batch.units], absolute[batch.units], lost)
    return n2, absolute


def _add_triangle(
    gram: Tensor, low: int, n2: Tensor, absolute: Tensor, lost: Tensor | None = None
) -> None:
    """Add block row ``low`` of the lower triangle, its part left of the diagonal block twice."""
    for total in (n2, absolute):
        if total is absolute:
            gram.abs_()
            if lost is not None:
                gram += lost
        total += gram[..., low:].sum((1, 2))
        if low:
            total += 2 * gram[..., :low].sum((1, 2))


def token_gram_norm(
    tokens: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    padding_idx: int | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """Sum ``<g_t, g_s>`` and its absolute value over pairs of rows that hold the same token."""
    dtype = accumulate_dtype(g.dtype)
    n2 = g.new_zeros(cu_seqlens.shape[0] - 1, dtype=dtype)
    absolute = torch.zeros_like(n2)
    with ieee_matmul():
        for batch in batches(cu_seqlens, g.shape[0]):
            x, y = batch.of(tokens, tokens.dtype), batch.of(g, dtype)
            for low in range(0, x.shape[1], _GRAM_ROWS):
                high = low + _GRAM_ROWS
                same = x[:, low:high, None] == x[:, None, :high]
                if padding_idx is not None:
                    same &= (x[:, low:high] != padding_idx)[..., None]
                gram = (y[:, low:high] @ y[:, :high].mT).masked_fill_(~same, 0.0)
                _add_triangle(gram, low, n2[batch.units], absolute[batch.units])
    return n2, absolute


def _squared_norm(x: Tensor) -> Tensor:
    """Squared norm of each row of ``(..., n)``, read once; of more at a time it would be inexact.

    A norm over k elements is summed one by one in a few lanes: 28 million lose 0.3 %.
    """
    return torch.linalg.vector_norm(x, dim=-1).square_()


def mm_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor, bias: bool, row_multiple: int) -> Tensor:
    """Return ``|G_i^T A_i|^2 (+ |b_i|^2)``, forming a block of rows of the product at a time."""
    dtype = accumulate_dtype(g.dtype)
    n2 = g.new_zeros(cu_seqlens.shape[0] - 1, dtype=dtype)
    (_, d), (rows, p) = a.shape, g.shape
    step = max(1, _PRODUCT_CHUNK // max(d, 1))
    with ieee_matmul():
        for batch in batches(cu_seqlens, rows, p * d):
            x, y = batch.of(a, dtype), batch.of(g, dtype)
            for low in range(0, p, step):
                n2[batch.units] += _squared_norm(y[..., low : low + step].mT @ x).sum(1)
            if bias:
                n2[batch.units] += y.sum(1).square_().sum(1)
    return n2


def scaled_mm(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    out: Tensor,
    bias_out: Tensor | None,
    row_multiple: int,
) -> None:
    """Add ``sum_i c_i G_i^T A_i`` to ``out`` and ``sum_i c_i b_i`` to ``bias_out``.

    Rows of units whose scale is 0 are left out; the others are scaled after widening.
    """
    row_scale, kept = _row_scale(scale, cu_seqlens, g.shape[0])
    if kept is not None:
        a, g, row_scale = a[kept], g[kept], row_scale[kept]
    with ieee_matmul():
        for low in range(0, g.shape[0], _PRODUCT_ROWS):
            rows = slice(low, low + _PRODUCT_ROWS)
            scaled = g[rows].to(out.dtype) * row_scale[rows, None]
            out.addmm_(scaled.T, a[rows].to(out.dtype))
            if bias_out is not None:
                bias_out += scaled.sum(0)


def _row_scale(scale: Tensor, cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
    """Return each row's scale, and which rows have one that is not 0 (None: all)."""
    unit_bounds(cu_seqlens, rows)
    row_scale = scale.repeat_interleave(cu_seqlens.diff(), output_size=rows)
    kept = row_scale != 0
    return row_scale, None if bool(kept.all()) else kept


def clip_factors(n2: Tensor, threshold: Tensor, clipping: str, stability: float) -> Tensor:
    """Return the factors of `shared_kernels.ops.dp.clip_factors`, checked by the caller."""
    norm = n2.sqrt()
    if clipping == "abadi":
        factor = (threshold / norm).clamp(max=1)
    else:
        factor = threshold / (norm + stability)
    factor = factor * torch.where(threshold.isinf(), 1.0, SHRINK).to(factor.dtype)
    # an infinite n2 has made it 0 or NaN, a negative one NaN
    return torch.where(factor.isfinite(), factor, 0.0)


def gram_steps(features: int, outputs: int) -> float:
    """Return the part of `gram_error_bound` that does not depend on the unit's length."""
    return features**0.5 + outputs**0.5 + DRIFT * (features + outputs)


def certified_norm(
    n2: Tensor, absolute: Tensor, cu_seqlens: Tensor, features: int, outputs: int
) -> Tensor:
    """Return Gram norms plus the bound of their rounding errors; NaN stays NaN."""
    steps = cu_seqlens.diff().to(absolute.dtype).sqrt() + gram_steps(features, outputs)
    return n2.clamp(min=0) + steps * (torch.finfo(absolute.dtype).eps * absolute)


def gram_clip(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    threshold: Tensor,
    out: Tensor,
    bias_out: Tensor | None,
    clipping: str,
    stability: float,
    max_seqlen: int | None,
    row_multiple: int,
) -> Tensor:
    """Certify the Gram norms, make factors of them, and add the scaled sum."""
    n2, absolute = gram_norm(a, g, cu_seqlens, bias_out is not None, max_seqlen)
    n2 = certified_norm(n2, absolute, cu_seqlens, a.shape[1], g.shape[1])
    factors = clip_factors(n2, threshold, clipping, stability)
    scaled_mm(a, g, cu_seqlens, factors, out, bias_out, row_multiple)
    return n2


def mm_clip(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    threshold: Tensor,
    out: Tensor,
    bias_out: Tensor | None,
    clipping: str,
    stability: float,
    chunk: int | None,
    max_seqlen: int | None,
    equal: bool,
    accumulate: bool,
) -> Tensor:
    """Form products, take their norms and factors, and add them: a few units at a time.

    As many as leave their products in a cache, and at least one.
    """
    if not accumulate:
        out.zero_()
    (_, d), (rows, p), dtype = a.shape, g.shape, out.dtype
    n2 = g.new_zeros(cu_seqlens.shape[0] - 1, dtype=dtype)
    buffer = out.new_empty(0)
    with ieee_matmul():
        for batch in batches(cu_seqlens, rows, p * d, _CLIP_CHUNK):
            x, y = batch.of(a, dtype), batch.of(g, dtype)
            if len(buffer) < batch.count:
                buffer = out.new_empty(batch.count, p, d)
            products = buffer[: batch.count]
            if batch.count > 1:
                torch.bmm(y.mT, x, out=products)
            else:
                torch.mm(y[0].T, x[0], out=products[0])
            totals = _squared_norm(products).sum(1)
            biases = None if bias_out is None else y.sum(1)
            if biases is not None:
                totals += biases.square().sum(1)
            n2[batch.units] = totals
            factors = clip_factors(totals, threshold, clipping, stability)
            for factor, product in zip(factors.tolist(), products, strict=True):
                # of a unit left out, 0 times what may be infinite
                if factor != 0:
                    out.add_(product, alpha=factor)
            if bias_out is not None and biases is not None:
                bias_out += torch.where(factors[:, None] != 0, factors[:, None] * biases, 0).sum(0)
    return n2


def sums(x: Tensor, g: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Return each unit's sum of ``x``, or of ``x * g``, over its rows."""
    dtype = accumulate_dtype(x.dtype)
    out = x.new_zeros(cu_seqlens.shape[0] - 1, x.shape[1], dtype=dtype)
    for batch in batches(cu_seqlens, x.shape[0]):
        rows = batch.of(x, dtype)
        out[batch.units] = (rows if g is None else rows * batch.of(g, dtype)).sum(1)
    return out


def embedding_accumulate(
    tokens: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    out: Tensor,
    padding_idx: int | None,
) -> None:
    """Add each row, times its unit's scale, to the row of ``out`` that its token names."""
    row_scale, kept = _row_scale(scale, cu_seqlens, g.shape[0])
    if padding_idx is not None:
        real = tokens != padding_idx
        kept = real if kept is None else kept & real
    if kept is not None:
        tokens, g, row_scale = tokens[kept], g[kept], row_scale[kept]
    out.index_add_(0, tokens, g.to(out.dtype) * row_scale[:, None])
