"""The definition of the ghost operations in plain torch.

A linear layer reads X_b (t, i) for sample b; with the gradients D_b (t, o) of its outputs, the
sample's gradient of the layer's weight is ``G_b = D_b^T X_b = sum_t d_bt x_bt^T`` (o, i). Inner
products with it need no G_b::

    <Y, G_b>   = sum_t d_bt^T Y x_bt = sum_t (d_bt^T U) (V^T x_bt)      for Y = U V^T
    <G_a, G_b> = sum_{t,t'} (x_at . x_bt') (d_at . d_bt')

Sources: the second form, Goodfellow (arXiv 1510.01799) and Li et al. (ICLR 2022, "ghost clipping");
covariances A = X^T X and S = D^T D of the Kronecker factors, Martens and Grosse (ICML 2015); the
sketch of both sides of the gradient, Choe et al. (arXiv 2405.13954, "LoGra"), here with random
signs. Tokens outside a mask count nothing, whatever they hold. Everything is accumulated in
float32, in float64 for float64 inputs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shared_kernels.ops.dp.reference import accumulate_dtype, ieee_matmul
from shared_kernels.random.api import noise

#: Rows that are widened at a time, and rows of a tile of a token-Gram matrix.
_ROWS, _GRAM_ROWS = 8192, 1024
#: Elements of gradients that are held at a time.
_PRODUCT_CHUNK = 1 << 22
#: Elements of one gradient that are multiplied at a time: longer sums lose digits.
_PRODUCT_TERMS = 1 << 18
#: Streams of the signs of a sketch: the random generator's ``uid``.
OUT_SIDE, IN_SIDE = 0, 1
#: Columns of a sketch that share a stream; the generator's ``direction`` numbers the blocks.
SIGN_COLUMNS = 64


def pieces(samples: int, tokens: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield samples and tokens, at most ``rows`` rows at a time: whole samples where they fit."""
    if tokens > rows:
        for sample in range(samples):
            for low in range(0, tokens, rows):
                yield slice(sample, sample + 1), slice(low, min(low + rows, tokens))
    elif tokens:
        count = rows // tokens
        for first in range(0, samples, count):
            yield slice(first, min(first + count, samples)), slice(0, tokens)


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x``, 0 at the tokens outside the mask."""
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def _part(x: Tensor, mask: Tensor | None, where: tuple[slice, slice], dtype: torch.dtype) -> Tensor:
    """Return a piece of ``x``, masked and widened."""
    return kept(x[where], None if mask is None else mask[where]).to(dtype)


def ghost_dot(x: Tensor, d: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``r_qb = sum_t d_bt^T Y_q x_bt``: the product with Y on its narrow side."""
    dtype = accumulate_dtype(x.dtype)
    out = x.new_zeros(y.shape[0], x.shape[0], dtype=dtype)
    if y.shape[1] > y.shape[2]:
        x, d, y = d, x, y.mT
    with ieee_matmul():
        for where in pieces(x.shape[0], x.shape[1], _ROWS):
            rows, others = (_part(m, mask, where, dtype) for m in (x, d))
            for query, matrix in enumerate(y):
                made = rows @ matrix.to(dtype).T
                out[query, where[0]] += made.mul_(others).sum((1, 2))
    return out


def ghost_dot_low_rank(x: Tensor, d: Tensor, u: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``r_qb = sum_t (d_bt^T U_q) . (x_bt^T V_q)``."""
    dtype = accumulate_dtype(x.dtype)
    out = x.new_zeros(u.shape[0], x.shape[0], dtype=dtype)
    with ieee_matmul():
        for where in pieces(x.shape[0], x.shape[1], _ROWS):
            rows, grads = (_part(m, mask, where, dtype) for m in (x, d))
            for query, (left, right) in enumerate(zip(u, v, strict=True)):
                made = rows @ right.to(dtype)
                out[query, where[0]] += made.mul_(grads @ left.to(dtype)).sum((1, 2))
    return out


def pairwise_way(
    samples1: int, tokens1: int, samples2: int, tokens2: int, features: int, outputs: int
) -> str:
    """Return the way with fewer multiplications, see `shared_kernels.ops.ghost.pairwise_way`."""
    rows1, rows2 = samples1 * tokens1, samples2 * tokens2
    gram = rows1 * rows2 * (features + outputs)
    product = (rows1 + rows2 + samples1 * samples2) * features * outputs
    return "gram" if gram <= product else "product"


def chosen_way(way: str, x1: Tensor, d1: Tensor, x2: Tensor) -> str:
    """Return ``way``, or what `pairwise_way` takes for ``auto``."""
    if way != "auto":
        return way
    return pairwise_way(*x1.shape[:2], *x2.shape[:2], x1.shape[2], d1.shape[2])


def pairwise_ghost(
    x1: Tensor,
    d1: Tensor,
    x2: Tensor,
    d2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    way: str,
) -> Tensor:
    """Return ``<G_i, G_j>`` of each sample of the first set with each of the second."""
    if chosen_way(way, x1, d1, x2) == "gram":
        return _pairwise_gram(x1, d1, x2, d2, mask1, mask2)
    dtype = accumulate_dtype(x1.dtype)
    return pairwise_product(
        x1, d1, x2, d2, mask1, mask2, lambda x, d: d.to(dtype).mT @ x.to(dtype), _PRODUCT_CHUNK
    )


def _pairwise_gram(
    x1: Tensor,
    d1: Tensor,
    x2: Tensor,
    d2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
) -> Tensor:
    """Sum products of inner products of tokens, tile by tile."""
    dtype = accumulate_dtype(x1.dtype)
    out = x1.new_zeros(x1.shape[0], x2.shape[0], dtype=dtype)
    with ieee_matmul():
        for one in pieces(x1.shape[0], x1.shape[1], _GRAM_ROWS):
            a1, g1 = (_part(m, mask1, one, dtype) for m in (x1, d1))
            for two in pieces(x2.shape[0], x2.shape[1], _GRAM_ROWS):
                a2, g2 = (_part(m, mask2, two, dtype) for m in (x2, d2))
                gram = a1.flatten(0, 1) @ a2.flatten(0, 1).T
                gram *= g1.flatten(0, 1) @ g2.flatten(0, 1).T
                gram = gram.view(*a1.shape[:2], *a2.shape[:2])
                out[one[0], two[0]] += gram.sum((1, 3))
    return out


def pairwise_product(
    x1: Tensor,
    d1: Tensor,
    x2: Tensor,
    d2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    form: Callable[[Tensor, Tensor], Tensor],
    chunk: int,
) -> Tensor:
    """Form the same block of all gradients, and add its share of the inner products.

    Args:
        x1: ``(b1, t1, i)``.
        d1: ``(b1, t1, o)``.
        x2: ``(b2, t2, i)``.
        d2: ``(b2, t2, o)``.
        mask1: bool ``(b1, t1)`` or None.
        mask2: bool ``(b2, t2)`` or None.
        form: Makes ``D_b^T X_b`` of each sample, in the accumulation dtype.
        chunk: Elements of gradients that are held at a time, unless a single one of each is more.

    Returns:
        ``(b1, b2)`` in the accumulation dtype.
    """
    out = x1.new_zeros(x1.shape[0], x2.shape[0], dtype=accumulate_dtype(x1.dtype))
    features, outputs = x1.shape[2], d1.shape[2]
    if not (out.numel() and features and outputs):
        return out
    size = max(1, min(chunk // (x1.shape[0] + x2.shape[0]), _PRODUCT_TERMS))
    columns = min(features, size)
    rows = max(1, size // columns)
    with ieee_matmul():
        for low in range(0, outputs, rows):
            for left in range(0, features, columns):
                first, second = (
                    form(
                        kept(x[..., left : left + columns], mask),
                        kept(d[..., low : low + rows], mask),
                    ).flatten(1)
                    for x, d, mask in ((x1, d1, mask1), (x2, d2, mask2))
                )
                out.addmm_(first, second.T)
    return out


def kron_cov_(
    x: Tensor, d: Tensor, a: Tensor, s: Tensor, mask: Tensor | None, weights: Tensor | None
) -> None:
    """Add ``sum_bt w_bt x_bt x_bt^T`` to ``a`` and ``sum_bt w_bt d_bt d_bt^T`` to ``s``.

    Rows of weight 0 are left out; the others are weighted after widening.
    """
    live = mask
    if weights is not None:
        live = weights != 0 if mask is None else mask & (weights != 0)
    with ieee_matmul():
        for matrix, out in ((x, a), (d, s)):
            for where in pieces(x.shape[0], x.shape[1], _ROWS):
                rows = _part(matrix, live, where, out.dtype)
                weighted = rows if weights is None else rows * weights[where][..., None]
                out.addmm_(weighted.flatten(0, 1).T, rows.flatten(0, 1))


def signs(
    features: int, rank: int, seed: int, side: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the random signs of one side of a sketch, ``(features, rank)``.

    Column ``64 j + k`` of row c is element ``64 c + k`` of the generator's Rademacher stream of
    direction j: neither the rank nor the number of features moves a sign.
    """
    blocks = [
        noise(
            features * SIGN_COLUMNS,
            seed=seed,
            uid=side,
            direction=block,
            dist="rademacher",
            device=device,
        ).view(features, SIGN_COLUMNS)
        for block in range(-(-rank // SIGN_COLUMNS))
    ]
    return torch.cat(blocks, 1)[:, :rank].to(dtype)


def kron_sketch(
    x: Tensor, d: Tensor, seed: int, out_rank: int, in_rank: int, mask: Tensor | None
) -> Tensor:
    """Return ``z_b = vec((D_b R_o)^T (X_b R_i))``, with signs over ``sqrt(k)`` for R."""
    dtype = accumulate_dtype(x.dtype)
    left = signs(d.shape[2], out_rank, seed, OUT_SIDE, x.device, dtype)
    right = signs(x.shape[2], in_rank, seed, IN_SIDE, x.device, dtype)
    out = x.new_zeros(x.shape[0], out_rank, in_rank, dtype=dtype)
    with ieee_matmul():
        for where in pieces(x.shape[0], x.shape[1], _ROWS):
            rows, grads = (_part(m, mask, where, dtype) for m in (x, d))
            out[where[0]] += (grads @ left).mT @ (rows @ right)
    return out.mul_((out_rank * in_rank) ** -0.5).flatten(1)
