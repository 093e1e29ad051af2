"""Launches of the kernels: grids, configurations and the second stages of the sums.

16-bit matrices with aligned rows go to the kernels of `tma.py` on Hopper and later; a product needs
the promise that no block of rows holds two units besides. Everything else goes to `triton.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_kernels._autotune import choose
from shared_kernels._checks import message
from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.dp import reference

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
#: The same over tensor descriptors. Two accumulators of 128 x 256 would not fit the registers.
TMA_GRAM = {"BT": 128, "BK": 64, "num_warps": 8, "num_stages": 4}
TMA_PRODUCT = {"BP": 128, "BD": 256, "GROUP": 8, "num_warps": 8, "num_stages": 3}
#: Depths of a step, which divide the length of every unit.
TMA_DEPTHS = (64, 32, 16)
#: Units that one program can rank, and programs that fill a large GPU once.
_RANKED, _ONE_WAVE = 1024, 132
#: Programs that fill a large GPU twice. A constant, so that sums do not depend on the GPU.
_PROGRAMS = 264
#: What a chunk of products should fit (a second-level cache), and must fit.
_CACHE_BYTES, _CHUNK_BYTES = 32 << 20, 1 << 30
#: What a part of the rows should hold at least, so that splitting them is worth a second stage.
_SPLIT_ROWS = 512


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unsupported(first: Tensor, *args: Any) -> str | None:
    """Say why no kernel can take these arguments, or None."""
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in (first, *args)):
        return "float64 has no kernel"
    if first.is_cuda and _capability(first.device) < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {_capability(first.device)}"
    return None


def _kernels(*tensors: Tensor | None) -> Any:
    """Import the kernels; launch options are not part of their signatures, hence Any."""
    reason = unsupported(*(t for t in tensors if t is not None))
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.dp import triton

    return triton


def _wide(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can describe these matrices."""
    return all(
        m.shape[0] > 0
        and m.shape[1] > 0
        and m.stride(1) == 1
        and m.stride(0) * m.element_size() % 16 == 0
        and m.data_ptr() % 16 == 0
        and (interpreting() or (m.element_size() == 2 and _capability(m.device) >= (9, 0)))
        for m in matrices
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _depth(row_multiple: int) -> int | None:
    """Return the depth of a step that no unit's boundary falls into."""
    return next((depth for depth in TMA_DEPTHS if row_multiple % depth == 0), None)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


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
    if units and _wide(g, *([first] if width else [])):
        with torch.cuda.device_of(g):
            return _wide_gram(first, g, cu_seqlens, longest, **options)

    def launch(config: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        blocks = _ceil(longest, config["BT"])
        parts = max(1, min(blocks * (blocks + 1) // 2, _ceil(2 * _PROGRAMS, max(units, 1))))
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
                WIDEN=interpreting(),
                **options,
                **config,
            )
        return n2.sum(1), absolute.sum(1)

    with torch.cuda.device_of(g):
        kind = _kind(g, width, g.shape[1], longest, units)
        return launch(choose(op, kind, GRAM_CONFIGS[g.element_size()], launch))


def _wide_gram(
    first: Tensor, g: Tensor, cu_seqlens: Tensor, longest: int, *, padding: int, **options: bool
) -> tuple[Tensor, Tensor]:
    from shared_kernels.ops.dp import tma

    kernel: Any = tma.gram_kernel
    units, tokens = cu_seqlens.shape[0] - 1, first.dim() == 1
    config = TMA_GRAM | ({"BT": 64, "num_warps": 4} if longest <= 64 else {})
    blocks = _ceil(longest, config["BT"])
    parts = max(1, min(blocks * (blocks + 1) // 2, _ceil(2 * _PROGRAMS, units)))
    n2 = g.new_empty(units, parts, dtype=torch.float32)
    absolute = torch.empty_like(n2)
    outputs = _descriptor(g, config["BT"], config["BK"])
    inputs = outputs if tokens else _descriptor(first, config["BT"], config["BK"])
    kernel[(units * parts,)](
        inputs,
        outputs,
        first if tokens else cu_seqlens,
        cu_seqlens,
        n2,
        absolute,
        0 if tokens else first.shape[1],
        g.shape[1],
        parts,
        padding,
        WIDEN=interpreting(),
        **options,
        **config,
    )
    return n2.sum(1), absolute.sum(1)


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
    return _ceil(g.shape[1], config["BP"]) * _ceil(a.shape[1], config["BD"])


def mm_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor, bias: bool, row_multiple: int) -> Tensor:
    """See `reference.mm_norm`; NaN for all units if a boundary breaks the promise."""
    kernel = _kernels(a, g).mm_norm_kernel
    units, depth = cu_seqlens.shape[0] - 1, _depth(row_multiple)

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

    def wide(depth: int) -> Tensor:
        from shared_kernels.ops.dp import tma

        kernel: Any = tma.mm_norm_kernel
        squares = g.new_empty(units, _tiles(a, g, TMA_PRODUCT), dtype=torch.float32)
        kernel[(squares.numel(),)](
            _descriptor(a, depth, TMA_PRODUCT["BD"]),
            _descriptor(g, depth, TMA_PRODUCT["BP"]),
            cu_seqlens,
            squares,
            a.shape[1],
            g.shape[1],
            WIDEN=interpreting(),
            BK=depth,
            **TMA_PRODUCT,
        )
        return torch.where((cu_seqlens % depth == 0).all(), squares.sum(1), float("nan"))

    with torch.cuda.device_of(g):
        kind = _kind(g, a.shape[1], g.shape[1], g.shape[0], units)
        if depth is not None and units and _wide(a, g):
            n2 = wide(depth)
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
    units, rows, depth = cu_seqlens.shape[0] - 1, g.shape[0], _depth(row_multiple)

    def launch(config: Mapping[str, int], out: Tensor) -> None:
        tiles = _tiles(a, g, config)
        splits = max(1, min(_ceil(_PROGRAMS, max(tiles, 1)), _ceil(rows, _SPLIT_ROWS)))
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
        if depth is not None and 0 < units <= _RANKED and _wide(a, g):
            _wide_scaled_mm(a, g, cu_seqlens, scale, out, depth)
        else:
            kind = _kind(g, a.shape[1], g.shape[1], rows, units)
            configs = PRODUCT_CONFIGS[g.element_size()]
            # candidates are timed on a copy, because they add to the output
            trial = lambda config: launch(config, out.clone())  # noqa: E731
            launch(choose("segment_scaled_mm", kind, configs, trial), out)
    if bias_out is not None:
        _add_scaled(sums(g, None, cu_seqlens), scale, bias_out)


def _wide_scaled_mm(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, scale: Tensor, out: Tensor, depth: int
) -> None:
    from shared_kernels.ops.dp import tma

    if out.stride(0) == 1 or a.shape[1] < TMA_PRODUCT["BD"] <= g.shape[1]:
        # the wide side of a tile lies along the output's rows
        a, g, out = g, a, out.t()
    units, tiles = cu_seqlens.shape[0] - 1, _tiles(a, g, TMA_PRODUCT)
    order = cu_seqlens.new_empty(units + 1)
    block = 1 << max(units - 1, 0).bit_length()
    rank: Any = tma.order_kernel
    rank[(1,)](scale, cu_seqlens, order, units, MULTIPLE=depth, BLOCK=block, num_warps=4)
    splits = max(1, min(units, _ONE_WAVE // tiles))
    parts = out[None] if splits == 1 else out.new_empty(splits, *out.shape)
    kernel: Any = tma.scaled_mm_kernel
    kernel[(tiles * splits,)](
        _descriptor(a, depth, TMA_PRODUCT["BD"]),
        _descriptor(g, depth, TMA_PRODUCT["BP"]),
        cu_seqlens,
        order,
        scale,
        parts,
        units,
        a.shape[1],
        g.shape[1],
        *parts.stride(),
        splits,
        ADD=splits == 1,
        WIDEN=interpreting(),
        BK=depth,
        **TMA_PRODUCT,
    )
    if splits > 1:
        out += parts.sum(0)


def _add_scaled(values: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``sum_i scale_i values_i``, whatever the values are where the scale is 0."""
    out += torch.where(scale[:, None] != 0, scale[:, None] * values, 0.0).sum(0)


def _combine(products: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add ``sum_i scale_i products_i`` to ``out`` in one pass; a scale of 0 adds nothing."""
    kernel = _kernels(products).combine_kernel
    count, p, d = products.shape
    block = {"BP": 16, "BD": 128}
    grid = (_ceil(p, block["BP"]) * _ceil(d, block["BD"]),)
    kernel[grid](products, scale, out, count, p, d, *out.stride(), **block, num_warps=4)


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
) -> Tensor:
    """See `reference.mm_clip`; a unit that breaks the promises about lengths has the norm NaN."""
    units, rows = cu_seqlens.shape[0] - 1, g.shape[0]
    if not out.numel() or not rows:
        return g.new_zeros(units, dtype=torch.float32)
    length = rows // units if equal else max_seqlen
    if length is None:
        raise ValueError(
            message("max_seqlen", "a length where units are not equal", None, "pass the longest")
        )
    if chunk is None:
        size = 4 * out.numel()
        chunk = max(1, _CACHE_BYTES // size, min(4, _CHUNK_BYTES // size))
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    if equal:
        kept = (lengths == length) & (starts == torch.arange(units, device=g.device) * length)
    else:
        kept = lengths <= length
    n2 = g.new_full((units,), float("nan"), dtype=torch.float32)
    biases = None if bias_out is None else sums(g, None, cu_seqlens)
    with torch.cuda.device_of(g), reference.ieee_matmul():
        for first in range(0, units, chunk):
            some = slice(first, first + chunk)
            if equal:
                span = slice(first * length, min(units, first + chunk) * length)
                x, y = (m[span].unflatten(0, (-1, length)) for m in (a, g))
            else:
                x, y = (_padded(m, starts[some], lengths[some], length) for m in (a, g))
            products = _products(x, y)
            total = torch.linalg.vector_norm(products, dim=2).square_().sum(1)
            if biases is not None:
                total += biases[some].square().sum(1)
            n2[some] = torch.where(kept[some], total, n2[some])
            factors = reference.clip_factors(n2[some], threshold, clipping, stability)
            _combine(products, factors, out)
            if biases is not None and bias_out is not None:
                _add_scaled(biases[some], factors, bias_out)
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
        grid = (out.shape[0] * _ceil(x.shape[1], block["BH"]),)
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
        kernel[(rows * _ceil(h, block["BH"]),)](
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
