"""Launches of the kernels: grids, configurations and the second stages of the sums."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_kernels._autotune import choose
from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.dp.launch import unsupported
from shared_kernels.ops.dp.reference import ieee_matmul
from shared_kernels.ops.dp.wide import PROGRAMS, ceil_div, power_of_two
from shared_kernels.ops.ghost import reference
from shared_kernels.random.op import signed_words

__all__ = [
    "ghost_dot",
    "ghost_dot_low_rank",
    "kron_cov_",
    "kron_sketch",
    "pairwise_ghost",
    "unsupported",
]


def _configs(*rows: tuple[int, ...], names: tuple[str, ...]) -> tuple[dict[str, int], ...]:
    """Name the numbers of launch configurations."""
    return tuple(dict(zip((*names, "num_warps", "num_stages"), row, strict=True)) for row in rows)


#: Launch configurations by the bytes of an element, the default first. Rows, outputs and depth.
DOT_CONFIGS = {
    2: _configs(
        (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4),
        names=("BT", "BO", "BK"),
    ),
    4: _configs((64, 64, 32, 4, 2), (64, 64, 16, 4, 2), (32, 64, 32, 4, 2),
                names=("BT", "BO", "BK")),
}  # fmt: skip
#: Rows and depth; the rank has one block of at most `_MOST_RANK`.
LOW_RANK_CONFIGS = {
    2: _configs((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), names=("BT", "BK")),
    4: _configs((64, 32, 4, 2), (32, 32, 4, 2), names=("BT", "BK")),
}
#: Rows of both sides of a tile, and depth.
GRAM_CONFIGS = {
    2: _configs((128, 64, 8, 3), (64, 64, 4, 4), (128, 32, 8, 4), names=("BT", "BK")),
    4: _configs((64, 32, 4, 2), (64, 16, 8, 2), (32, 32, 4, 2), names=("BT", "BK")),
}
#: Columns of both sides of a tile, and rows of a step.
COV_CONFIGS = {
    2: _configs((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 4), names=("BN", "BK")),
    4: _configs((64, 32, 4, 2), (64, 16, 4, 2), (64, 32, 8, 2), names=("BN", "BK")),
}
#: Rows of a block.
PROJECT_CONFIGS = {
    2: _configs((128, 8, 3), (64, 4, 3), (64, 8, 2), names=("BT",)),
    4: _configs((64, 8, 2), (32, 4, 2), (32, 8, 2), names=("BT",)),
}
_MOST_RANK = 64
#: Sums of rows, one for each query, that are held at a time.
_PARTS = 1 << 24
#: Elements of gradients that are held at a time.
_PRODUCT_CHUNK = 1 << 27
#: What a part of the rows, and of the columns, should hold, to be worth a second stage.
_SPLIT_ROWS, _SPLIT_COLUMNS = 512, 256


def _kernels(*tensors: Tensor) -> Any:
    """Import the kernels; launch options are not part of their signatures, hence Any."""
    reason = unsupported(*tensors)
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.ghost import triton

    return triton


def _kind(x: Tensor, *sizes: int) -> str:
    """Name a kind of call: dtype, and sizes to a power of two."""
    return "-".join([str(x.dtype).removeprefix("torch."), *(str(n.bit_length()) for n in sizes)])


def _flat(*tensors: Tensor | None) -> bool:
    """Whether one stride leads through all tokens of all samples of each tensor."""
    return all(
        t is None or t.shape[0] <= 1 or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors
    )


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a (samples, tokens) tensor that may be missing."""
    return (0, 0) if tensor is None else tensor.stride()


def ghost_dot(x: Tensor, d: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """See `reference.ghost_dot`."""
    kernel = _kernels(x, d, y).dot_kernel
    (samples, tokens, i), o, rows = x.shape, d.shape[2], x.shape[0] * x.shape[1]
    out = x.new_zeros(y.shape[0], samples, dtype=torch.float32)
    if not (out.numel() and tokens and i and o):
        return out

    def launch(config: Mapping[str, int], some: Tensor) -> Tensor:
        blocks, tiles = ceil_div(rows, config["BT"]), ceil_div(o, config["BO"])
        splits = min(tiles, ceil_div(PROGRAMS, blocks * some.shape[0]))
        parts = x.new_empty(some.shape[0], splits, samples, tokens, dtype=torch.float32)
        kernel[(blocks * splits * some.shape[0],)](
            x,
            d,
            some,
            mask,
            parts,
            rows,
            tokens,
            i,
            o,
            *x.stride(),
            *d.stride(),
            *some.stride(),
            *_strides(mask),
            splits,
            FLAT=_flat(x, d, mask),
            WIDEN=interpreting(),
            **config,
        )
        return parts.sum((1, 3))

    step = max(1, _PARTS // rows)
    kind, configs = _kind(x, rows, i, o, y.shape[0]), DOT_CONFIGS[x.element_size()]
    with torch.cuda.device_of(x):
        config = choose("ghost_dot", kind, configs, lambda config: launch(config, y[:step]))
        for low in range(0, y.shape[0], step):
            out[low : low + step] = launch(config, y[low : low + step])
    return out


def ghost_dot_low_rank(x: Tensor, d: Tensor, u: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `reference.ghost_dot_low_rank`."""
    kernel = _kernels(x, d, u, v).low_rank_kernel
    (samples, tokens, i), o, rows = x.shape, d.shape[2], x.shape[0] * x.shape[1]
    rank = u.shape[2]
    out = x.new_zeros(u.shape[0], samples, dtype=torch.float32)
    if not (out.numel() and tokens and i and o and rank):
        return out

    def launch(config: Mapping[str, int], some: slice) -> Tensor:
        left, right = u[some], v[some]
        parts = x.new_empty(left.shape[0], samples, tokens, dtype=torch.float32)
        kernel[(ceil_div(rows, config["BT"]) * left.shape[0],)](
            x,
            d,
            left,
            right,
            mask,
            parts,
            rows,
            tokens,
            i,
            o,
            rank,
            *x.stride(),
            *d.stride(),
            *left.stride(),
            *right.stride(),
            *_strides(mask),
            FLAT=_flat(x, d, mask),
            WIDEN=interpreting(),
            BR=min(_MOST_RANK, max(16, power_of_two(rank))),
            **config,
        )
        return parts.sum(2)

    step = max(1, _PARTS // rows)
    kind, configs = _kind(x, rows, i, o, rank), LOW_RANK_CONFIGS[x.element_size()]
    with torch.cuda.device_of(x):
        config = choose(
            "ghost_dot_low_rank", kind, configs, lambda config: launch(config, slice(0, step))
        )
        for low in range(0, u.shape[0], step):
            some = slice(low, low + step)
            out[some] = launch(config, some)
    return out


def _form(x: Tensor, d: Tensor) -> Tensor:
    """Return ``D_b^T X_b`` in float32, contiguous; 16-bit operands are not widened on a GPU."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.bmm(d.mT, x, out_dtype=torch.float32)
    return torch.bmm(d.float().mT, x.float())


def pairwise_ghost(
    x1: Tensor,
    d1: Tensor,
    x2: Tensor,
    d2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    way: str,
) -> Tensor:
    """See `reference.pairwise_ghost`; products are those of the matrix library."""
    kernel = _kernels(x1, d1, x2, d2).gram_kernel
    (samples1, tokens1, i), (samples2, tokens2, o) = x1.shape, d2.shape
    if not (samples1 * tokens1 and samples2 * tokens2 and i and o):
        return x1.new_zeros(samples1, samples2, dtype=torch.float32)
    if reference.chosen_way(way, x1, d1, x2) == "product":
        return reference.pairwise_product(x1, d1, x2, d2, mask1, mask2, _form, _PRODUCT_CHUNK)

    def launch(config: Mapping[str, int]) -> Tensor:
        block = config["BT"]
        held1, held2 = (min(block, power_of_two(tokens)) for tokens in (tokens1, tokens2))
        programs = ceil_div(samples1, block // held1) * ceil_div(samples2, block // held2)
        steps = ceil_div(tokens1, held1) * ceil_div(tokens2, held2)
        splits = min(steps, ceil_div(2 * PROGRAMS, programs))
        parts = x1.new_empty(splits, samples1, samples2, dtype=torch.float32)
        kernel[(programs * splits,)](
            x1,
            d1,
            x2,
            d2,
            mask1,
            mask2,
            parts,
            samples1,
            tokens1,
            samples2,
            tokens2,
            i,
            o,
            *x1.stride(),
            *d1.stride(),
            *x2.stride(),
            *d2.stride(),
            *_strides(mask1),
            *_strides(mask2),
            splits,
            WIDEN=interpreting(),
            T1=held1,
            T2=held2,
            **config,
        )
        return parts[0] if splits == 1 else parts.sum(0)

    kind = _kind(x1, samples1, tokens1, samples2, tokens2, i, o)
    with torch.cuda.device_of(x1):
        return launch(choose("pairwise_ghost", kind, GRAM_CONFIGS[x1.element_size()], launch))


def kron_cov_(
    x: Tensor, d: Tensor, a: Tensor, s: Tensor, mask: Tensor | None, weights: Tensor | None
) -> None:
    """See `reference.kron_cov_`."""
    _kernels(x, d)
    _cov(x, a, mask, weights)
    _cov(d, s, mask, weights)


def _cov(x: Tensor, out: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
    """Add ``X^T diag(w) X`` to ``out``."""
    kernel = _kernels(x).cov_kernel
    (samples, tokens, width), rows = x.shape, x.shape[0] * x.shape[1]
    if not (samples and tokens and width):
        return

    def launch(config: Mapping[str, int], out: Tensor) -> None:
        tiles = ceil_div(width, config["BN"])
        splits = max(1, min(PROGRAMS * 2 // (tiles * (tiles + 1)), ceil_div(rows, _SPLIT_ROWS)))
        # parts of the rows are summed apart and added in order
        parts = out[None] if splits == 1 else out.new_empty(splits, width, width)
        kernel[(tiles * tiles * splits,)](
            x,
            mask,
            weights,
            parts,
            rows,
            tokens,
            width,
            *x.stride(),
            *_strides(mask),
            *_strides(weights),
            *parts.stride(),
            splits,
            FLAT=_flat(x, mask, weights),
            ADD=splits == 1,
            PRECISION="ieee" if weights is None or x.dtype == torch.float32 else "tf32x3",
            WIDEN=weights is not None or interpreting(),
            **config,
        )
        if splits > 1:
            out += parts.sum(0)

    kind = _kind(x, rows, width, weights is not None)
    # weighted tiles are float32
    configs = COV_CONFIGS[x.element_size() if weights is None else 4]
    with torch.cuda.device_of(x):
        # candidates are timed on a copy, because they add to the output
        config = choose("kron_cov_", kind, configs, lambda config: launch(config, out.clone()))
        launch(config, out)


def kron_sketch(
    x: Tensor, d: Tensor, seed: int, out_rank: int, in_rank: int, mask: Tensor | None
) -> Tensor:
    """See `reference.kron_sketch`: both sides by a kernel, their small product by the library."""
    _kernels(x, d)
    left = _project(d, seed, reference.OUT_SIDE, out_rank, mask)
    right = _project(x, seed, reference.IN_SIDE, in_rank, mask)
    with ieee_matmul():
        made = torch.bmm(left.mT, right)
    return made.mul_((out_rank * in_rank) ** -0.5).flatten(1)


def _project(x: Tensor, seed: int, side: int, rank: int, mask: Tensor | None) -> Tensor:
    """Return ``X R`` with the signs of one side, float32 ``(b, t, rank)``."""
    kernel = _kernels(x).project_kernel
    (samples, tokens, width), rows = x.shape, x.shape[0] * x.shape[1]
    if not (samples and tokens and width):
        return x.new_zeros(samples, tokens, rank, dtype=torch.float32)

    def launch(config: Mapping[str, int]) -> Tensor:
        programs = ceil_div(rows, config["BT"]) * ceil_div(rank, reference.SIGN_COLUMNS)
        splits = min(ceil_div(PROGRAMS, programs), ceil_div(width, _SPLIT_COLUMNS))
        parts = x.new_empty(splits, samples, tokens, rank, dtype=torch.float32)
        kernel[(programs * splits,)](
            x,
            mask,
            parts,
            rows,
            tokens,
            width,
            rank,
            *x.stride(),
            *_strides(mask),
            splits,
            *signed_words(seed),
            SIDE=side,
            FLAT=_flat(x, mask),
            WIDEN=interpreting(),
            **config,
        )
        return parts[0] if splits == 1 else parts.sum(0)

    kind = _kind(x, rows, width, rank)
    with torch.cuda.device_of(x):
        return launch(choose("kron_sketch", kind, PROJECT_CONFIGS[x.element_size()], launch))
