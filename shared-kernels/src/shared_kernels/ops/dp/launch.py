"""Launches of the kernels: grids, configurations and the second stages of the sums.

16-bit matrices with aligned rows go to the kernels of `triton_tma.py` on Hopper and later; a
product needs the promise besides that no block of rows holds two units. All others go to
`triton.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_kernels._autotune import choose
from shared_kernels._checks import message
from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.dp import reference, wide
from shared_kernels.ops.dp.wide import ceil_div

#: Launch configurations, the default first. Rows and columns of a Gram tile, depth of a step.
GRAM_CONFIGS = {
    2: tuple(
        {"BT": rows, "BK": depth, "num_warps": warps, "num_stages": stages}
        for rows, depth, warps, stages in (
            (128, 64, 8, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 32, 8, 4),
        )
    ),
    4: tuple(
        {"BT": rows, "BK": depth, "num_warps": warps, "num_stages": 2}
        for rows, depth, warps in ((64, 32, 4), (64, 16, 8), (32, 32, 4))
    ),
}  # fmt: skip
#: Rows and columns of a tile of the product, rows of a step.
PRODUCT_CONFIGS = {
    2: tuple(
        {"BP": rows, "BD": columns, "BK": depth, "num_warps": warps, "num_stages": stages}
        for rows, columns, depth, warps, stages in (
            (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
            (64, 64, 64, 4, 4),
        )
    ),
    4: tuple(
        {"BP": 64, "BD": 64, "BK": depth, "num_warps": warps, "num_stages": 2}
        for depth, warps in ((32, 4), (16, 4), (32, 8))
    ),
}  # fmt: skip
#: What the products of a chunk must fit, unless it is a single one.
_CHUNK_BYTES = 1 << 30
#: What a part of the rows should hold at least, so that splitting them is worth a second stage.
_SPLIT_ROWS = 512


def unsupported(first: Tensor, *args: Any) -> str | None:
    """Say why no kernel can take these arguments, or None."""
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in (first, *args)):
        return "float64 has no kernel"
    if first.is_cuda and wide.capability(first.device) < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {wide.capability(first.device)}"
    return None


def _kernels(*tensors: Tensor | None) -> Any:
    """Import the kernels; launch options are not part of their signatures, hence Any."""
    reason = unsupported(*(t for t in tensors if t is not None))
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.dp import triton

    return triton


def _kind(x: Tensor, *sizes: int) -> str:
    """Name a kind of call: dtype, and sizes to a power of two."""
    return "-".join([str(x.dtype).removeprefix("torch."), *(str(n.bit_length()) for n in sizes)])


def _gram(
    op: str,
    first: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    kernel = _kernels(first, g).gram_kernel
    units, longest = cu_seqlens.shape[0] - 1, g.shape[0] if max_seqlen is None else max_seqlen
    width = 0 if first.dim() == 1 else first.shape[1]
    if units and wide.fits(g, *([first] if width else [])):
        with torch.cuda.device_of(g):
            n2, absolute = wide.gram_parts(first, g, cu_seqlens, longest, **options).sum(2)
            return n2, absolute

    def launch(config: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        blocks = ceil_div(longest, config["BT"])
        parts = max(1, min(blocks * (blocks + 1) // 2, ceil_div(2 * wide.PROGRAMS, max(units, 1))))
        n2 = g.new_empty(units, parts, dtype=torch.float32)
        absolute = torch.empty_like(n2)
        if units:
            kernel[(units * parts,)](
                first,
                g,
                cu_seqlens,
                n2,
                absolute,
                width,
                g.shape[1],
                first.stride(0),
                first.stride(-1),
                *g.stride(),
                parts,
                LOST=reference.LOST,
                WIDEN=interpreting(),
                **options,
                **config,
            )
        return n2.sum(1), absolute.sum(1)

    with torch.cuda.device_of(g):
        kind = _kind(g, width, g.shape[1], longest, units)
        return launch(choose(op, kind, GRAM_CONFIGS[g.element_size()], launch))


def gram_norm(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, bias: bool, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """See `reference.gram_norm`."""
    options = {"padding": 0, "BIAS": bias, "TOKENS": False, "PADDING": False}
    return _gram("segment_gram_norm", a, g, cu_seqlens, max_seqlen, **options)


def token_gram_norm(
    tokens: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    padding_idx: int | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.token_gram_norm`."""
    padding = {"padding": padding_idx or 0, "PADDING": padding_idx is not None}
    options = {"BIAS": False, "TOKENS": True, **padding}
    return _gram("segment_token_gram_norm", tokens, g, cu_seqlens, max_seqlen, **options)


def _tiles(a: Tensor, g: Tensor, config: Mapping[str, int]) -> int:
    return ceil_div(g.shape[1], config["BP"]) * ceil_div(a.shape[1], config["BD"])


def mm_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor, bias: bool, row_multiple: int) -> Tensor:
    """See `reference.mm_norm`; NaN for all units if a boundary breaks the promise."""
    kernel = _kernels(a, g).mm_norm_kernel
    units, depth = cu_seqlens.shape[0] - 1, wide.depth_of(row_multiple)

    def launch(config: Mapping[str, int]) -> Tensor:
        squares = g.new_empty(units, _tiles(a, g, config), dtype=torch.float32)
        if squares.numel():
            kernel[(squares.numel(),)](
                a,
                g,
                cu_seqlens,
                squares,
                a.shape[1],
                g.shape[1],
                *a.stride(),
                *g.stride(),
                WIDEN=interpreting(),
                **config,
            )
        return squares.sum(1)

    with torch.cuda.device_of(g):
        kind = _kind(g, a.shape[1], g.shape[1], g.shape[0], units)
        if depth is not None and units and wide.fits(a, g):
            n2 = wide.mm_norm(a, g, cu_seqlens, depth)
        else:
            configs = PRODUCT_CONFIGS[g.element_size()]
            n2 = launch(choose("segment_mm_norm", kind, configs, launch))
    return n2 + sums(g, None, cu_seqlens).square_().sum(1) if bias else n2


def scaled_mm(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    out: Tensor,
    bias_out: Tensor | None,
    row_multiple: int,
) -> None:
    """See `reference.scaled_mm`; the sum is NaN if a boundary breaks the promise."""
    kernel = _kernels(a, g).scaled_mm_kernel
    units, rows, depth = cu_seqlens.shape[0] - 1, g.shape[0], wide.depth_of(row_multiple)

    def launch(config: Mapping[str, int], out: Tensor) -> None:
        tiles = _tiles(a, g, config)
        splits = max(1, min(ceil_div(wide.PROGRAMS, max(tiles, 1)), ceil_div(rows, _SPLIT_ROWS)))
        # parts of the rows are summed apart and added in order
        parts = out[None] if splits == 1 else out.new_empty(splits, *out.shape)
        if tiles and rows:
            kernel[(tiles * splits,)](
                a,
                g,
                cu_seqlens,
                scale,
                parts,
                units,
                rows,
                a.shape[1],
                g.shape[1],
                *a.stride(),
                *g.stride(),
                *parts.stride(),
                splits,
                BITS=units.bit_length(),
                ADD=splits == 1,
                WIDEN=interpreting(),
                **config,
            )
            if splits > 1:
                out += parts.sum(0)

    with torch.cuda.device_of(g):
        if depth is not None and 0 < units <= wide.RANKED and wide.fits(a, g):
            wide.scaled_mm(a, g, cu_seqlens, scale, out, depth)
        else:
            kind = _kind(g, a.shape[1], g.shape[1], rows, units)
            configs = PRODUCT_CONFIGS[g.element_size()]
            # candidates are timed on a copy, because they add to the output
            trial = lambda config: launch(config, out.clone())  # noqa: E731
            launch(choose("segment_scaled_mm", kind, configs, trial), out)
    if bias_out is not None:
        _add_scaled(sums(g, None, cu_seqlens), scale, bias_out)


def _add_scaled(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``sum_i scale_i values_i``, whatever the values are where the scale is 0."""
    out += torch.where(scale[:, None] != 0, scale[:, None] * values, 0.0).sum(0)


def _combine(products: Tensor, scale: Tensor, out: Tensor, add: bool) -> None:
    """Write ``sum_i scale_i products_i`` to ``out``, or add it; a scale of 0 adds nothing."""
    kernel = _kernels(products).combine_kernel
    count, p, d = products.shape
    block = {"BP": 16, "BD": 128}
    grid = (ceil_div(p, block["BP"]) * ceil_div(d, block["BD"]),)
    kernel[grid](products, scale, out, count, p, d, *out.stride(), ADD=add, **block, num_warps=4)


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
    """See `reference.mm_clip`; a unit that breaks the promises about lengths has the norm NaN."""
    units, rows = cu_seqlens.shape[0] - 1, g.shape[0]
    if not out.numel() or not rows:
        if not accumulate:
            out.zero_()
        return g.new_zeros(units, dtype=torch.float32)
    length = rows // units if equal else max_seqlen
    if length is None:
        raise ValueError(
            message("max_seqlen", "a length where units are not equal", None, "pass the longest")
        )
    if chunk is None:
        size = 4 * out.numel()
        chunk = min(units, max(1, _CHUNK_BYTES // size))
    n2 = g.new_empty(units, dtype=torch.float32)
    biases = None if bias_out is None else sums(g, None, cu_seqlens)
    depth = wide.depth_of(length) if equal and _worth_tiles(out) and wide.fits(a, g) else None
    options = (clipping, stability, "equal" if equal else "longest", length)
    with torch.cuda.device_of(g):
        for first in range(0, units, chunk):
            count = min(chunk, units - first)
            some, span = (
                slice(first, first + count),
                slice(first * length, (first + count) * length),
            )
            if depth is not None and count == units:
                products, squares = wide.products(a, g, cu_seqlens, depth)
            elif depth is not None:
                bounds = torch.arange(
                    0, count * length + 1, length, dtype=torch.int32, device=g.device
                )
                products, squares = wide.products(a[span], g[span], bounds, depth)
            else:
                if equal:
                    x, y = (m[span].unflatten(0, (count, length)) for m in (a, g))
                else:
                    starts = cu_seqlens[first : first + count + 1]
                    x, y = (_padded(m, starts[:-1], starts.diff(), length) for m in (a, g))
                with reference.ieee_matmul():
                    products = _products(x, y)
                squares = _squares(products)
            if biases is not None:
                squares = torch.cat([squares, biases[some].square().sum(1, keepdim=True)], 1)
            factors = _factors(squares, cu_seqlens, threshold, n2, first, *options)
            _combine(products, factors, out, accumulate or first > 0)
            if biases is not None and bias_out is not None:
                _add_scaled(biases[some], factors, bias_out)
    return n2


def _worth_tiles(out: Tensor) -> bool:
    """Whether the tiles of `wide` are not mostly outside a product of this shape."""
    return out.shape[0] >= wide.PRODUCT["BP"] // 2 and out.shape[1] >= wide.PRODUCT["BD"] // 2


def _squares(products: Tensor) -> Tensor:
    """Return sums of squares, ``(k, parts)``, of contiguous ``(k, p, d)``."""
    kernel = _kernels(products).squares_kernel
    size = products[0].numel()
    block = {"BLOCK": 2048, "STEPS": 16}
    parts = ceil_div(size, block["BLOCK"] * block["STEPS"])
    squares = products.new_empty(len(products), parts)
    kernel[(squares.numel(),)](products, squares, size, parts, **block, num_warps=8)
    return squares


def _factors(
    squares: Tensor,
    cu_seqlens: Tensor,
    threshold: Tensor,
    n2: Tensor | None,
    first: int,
    clipping: str,
    stability: float,
    check: str,
    length: int,
) -> Tensor:
    """Sum ``squares`` (k, parts) into ``n2`` from ``first`` on, and return the factors (k,)."""
    kernel = _kernels(squares).factors_kernel
    count, parts = squares.shape
    factors = squares.new_empty(count)
    if count:
        kernel[(count,)](
            squares,
            cu_seqlens,
            threshold,
            None if n2 is None else n2[first:],
            factors,
            parts,
            first,
            length,
            stability,
            CHECK=check,
            AUTOMATIC=clipping == "automatic",
            SHRINK=reference.SHRINK,
            BLOCK=min(1024, wide.power_of_two(parts)),
        )
    return factors


def clip_factors(n2: Tensor, threshold: Tensor, clipping: str, stability: float) -> Tensor:
    """See `reference.clip_factors`."""
    with torch.cuda.device_of(n2):
        return _factors(n2[:, None], n2, threshold, None, 0, clipping, stability, "none", 0)


def certified_norm(
    n2: Tensor, absolute: Tensor, cu_seqlens: Tensor, features: int, outputs: int
) -> Tensor:
    """See `reference.certified_norm`."""
    kernel = _kernels(n2).certify_kernel
    out = torch.empty_like(n2)
    if len(n2):
        with torch.cuda.device_of(n2):
            kernel[(ceil_div(len(n2), 256),)](
                n2,
                absolute,
                cu_seqlens,
                out,
                len(n2),
                reference.gram_steps(features, outputs),
                EPS=torch.finfo(n2.dtype).eps,
                BLOCK=256,
            )
    return out


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
    """See `reference.gram_clip`; the sum is NaN if a boundary breaks the promise."""
    _kernels(a, g)
    units, depth = cu_seqlens.shape[0] - 1, wide.depth_of(row_multiple)
    if depth is not None and bias_out is None and 0 < units <= wide.RANKED and wide.fits(a, g):
        longest = g.shape[0] if max_seqlen is None else max_seqlen
        with torch.cuda.device_of(g):
            return wide.gram_clip(
                a, g, cu_seqlens, threshold, out, clipping, stability, longest, depth
            )
    bias = bias_out is not None
    n2, absolute = gram_norm(a, g, cu_seqlens, bias, max_seqlen)
    n2 = certified_norm(n2, absolute, cu_seqlens, a.shape[1], g.shape[1])
    factors = clip_factors(n2, threshold, clipping, stability)
    scaled_mm(a, g, cu_seqlens, factors, out, bias_out, row_multiple)
    return n2


def _padded(x: Tensor, starts: Tensor, lengths: Tensor, length: int) -> Tensor:
    """Return the units' rows as ``(units, length, ...)``, zeros after each unit's own."""
    position = torch.arange(max(length, 1), device=x.device)
    index = (starts[:, None] + position).clamp_(max=x.shape[0] - 1)
    return x[index].masked_fill_((position >= lengths[:, None])[..., None], 0.0)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return ``G_i^T A_i`` in float32, contiguous ``(units, p, d)``."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.bmm(y.mT, x, out_dtype=torch.float32)
    return torch.bmm(y.float().mT, x.float())


def sums(x: Tensor, g: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """See `reference.sums`."""
    kernel = _kernels(x, g).sums_kernel
    out = x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=torch.float32)
    if out.numel():
        block = {"BT": 32, "BH": 64}
        grid = (out.shape[0] * ceil_div(x.shape[1], block["BH"]),)
        strides = (*x.stride(), *(x if g is None else g).stride())
        with torch.cuda.device_of(x):
            kernel[grid](x, g, cu_seqlens, out, x.shape[1], *strides, **block, num_warps=4)
    return out


def embedding_accumulate(
    tokens: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    out: Tensor,
    padding_idx: int | None,
) -> None:
    """See `reference.embedding_accumulate`; sorted, so that one program adds to one row."""
    kernel = _kernels(tokens, g).embedding_kernel
    rows, h = g.shape
    if not g.numel():
        return
    row_scale = scale.repeat_interleave(cu_seqlens.diff(), output_size=rows)
    ordered, order = tokens.sort(stable=True)
    block = {"BR": 16, "BH": 128}
    with torch.cuda.device_of(g):
        kernel[(rows * ceil_div(h, block["BH"]),)](
            ordered,
            order,
            row_scale,
            g,
            out,
            rows,
            h,
            out.shape[0],
            padding_idx or 0,
            *g.stride(),
            *out.stride(),
            PADDING=padding_idx is not None,
            **block,
            num_warps=4,
        )
