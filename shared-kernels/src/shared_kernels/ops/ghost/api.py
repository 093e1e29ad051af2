"""Public functions of the family: questions about per-sample gradients of linear layers.

Throughout, ``x`` (b, t, i) holds a layer's inputs, t tokens of b samples, and ``d`` (b, t, o) the
gradients of its outputs, of the same dtype: float32, bfloat16, float16 or float64. Sample b's
gradient of the weight is ``G_b = D_b^T X_b`` (o, i), and is not kept. ``mask``, bool (b, t), names
the tokens that count; the others may hold anything. Tensors may have any strides and must lie
outside autograd. Accumulation is float32 (float64 for float64) and never TF32, sums run in a fixed
order: equal calls give equal bits. Float64 has no Triton kernel.
"""

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, check_range, check_tensor, message
from shared_kernels.ops.dp.arguments import check_out
from shared_kernels.ops.dp.reference import accumulate_dtype
from shared_kernels.ops.ghost import op, reference
from shared_kernels.random.api import as_int64

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WAYS = ("auto", "gram", "product")
#: Columns of a sketch's side at most.
_MOST_RANK = 1 << 20


def _check_layer(
    x: Tensor, d: Tensor, mask: Tensor | None, *, names: tuple[str, str, str] = ("x", "d", "mask")
) -> None:
    check_tensor(names[0], x, dtypes=_FLOATS, shape=(None, None, None), strided=True)
    samples, tokens, _ = x.shape
    check_tensor(
        names[1], d, dtypes=(x.dtype,), shape=(samples, tokens, None), device=x.device, strided=True
    )
    if mask is not None:
        check_tensor(
            names[2],
            mask,
            dtypes=(torch.bool,),
            shape=(samples, tokens),
            device=x.device,
            strided=True,
        )


def _check_query(name: str, query: Tensor, shape: tuple[int | None, ...], x: Tensor) -> None:
    check_tensor(name, query, dtypes=(x.dtype,), shape=shape, device=x.device, strided=True)


def ghost_dot(
    x: Tensor, d: Tensor, y: Tensor, *, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Inner products of per-sample gradients with matrices: ``<Y, G_b> = sum_t d_bt^T Y x_bt``.

    Costs ``2 b t i o`` FLOPs for each matrix and one read of the inputs. On a GPU products stay in
    registers; on the CPU those of 8192 tokens exist at a time.

    Args:
        x: float ``(b, t, i)``.
        d: As ``x``, ``(b, t, o)``.
        y: As ``x``, ``(o, i)`` or ``(Q, o, i)``.
        mask: bool ``(b, t)``, tokens that count.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(b,)``, or ``(Q, b)`` for Q matrices.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes or devices do not fit together, or a tensor is part of autograd.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    _check_layer(x, d, mask)
    many = isinstance(y, Tensor) and y.dim() == 3
    shape = (d.shape[2], x.shape[2])
    _check_query("y", y, (None, *shape) if many else shape, x)
    found = op.ghost_dot(x, d, y if many else y[None], mask, impl)
    return found if many else found[0]


def ghost_dot_low_rank(
    x: Tensor, d: Tensor, u: Tensor, v: Tensor, *, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`ghost_dot` with ``Y = U V^T``, which is not formed: ``sum_t (d_bt^T U) . (x_bt^T V)``.

    Costs ``2 b t r (i + o)`` FLOPs for each matrix.

    Args:
        x: float ``(b, t, i)``.
        d: As ``x``, ``(b, t, o)``.
        u: As ``x``, ``(o, r)`` or ``(Q, o, r)``.
        v: As ``x``, ``(i, r)`` or ``(Q, i, r)``.
        mask: bool ``(b, t)``, tokens that count.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(b,)``, or ``(Q, b)`` for Q matrices.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes or devices do not fit together, or a tensor is part of autograd.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    _check_layer(x, d, mask)
    many = isinstance(u, Tensor) and u.dim() == 3
    outer = (None,) if many else ()
    _check_query("u", u, (*outer, d.shape[2], None), x)
    _check_query("v", v, (*u.shape[:-2], x.shape[2], u.shape[-1]), x)
    if not many:
        u, v = u[None], v[None]
    found = op.ghost_dot_low_rank(x, d, u, v, mask, impl)
    return found if many else found[0]


def pairwise_way(
    samples1: int, tokens1: int, samples2: int, tokens2: int, features: int, outputs: int
) -> str:
    """Return the way that ``pairwise_ghost(way="auto")`` takes: that of fewer multiplications.

    With b and t of each set, i features and o outputs, ``gram`` takes ``b1 t1 b2 t2 (i + o)`` and
    ``product`` ``(b1 t1 + b2 t2 + b1 b2) i o``; between equals ``gram``. For two sets of many
    samples that is ``t1 t2 (i + o) <= i o``, for a pair of samples ``t (i + o) <= 2 i o``.

    Args:
        samples1: b of the first set.
        tokens1: t of the first set.
        samples2: b of the second set.
        tokens2: t of the second set.
        features: i, columns of the layer's inputs.
        outputs: o, columns of its outputs.

    Returns:
        ``gram`` or ``product``.
    """
    return reference.pairwise_way(samples1, tokens1, samples2, tokens2, features, outputs)


def pairwise_ghost(
    x1: Tensor,
    d1: Tensor,
    x2: Tensor,
    d2: Tensor,
    *,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    way: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """Inner products of the per-sample gradients of two sets: ``<G_i, G_j>``.

    ``gram`` sums ``(x_it . x_jt') (d_it . d_jt')`` over pairs of tokens by tiles, which stay in
    registers on a GPU (10^6 elements on the CPU). ``product`` forms a block of all gradients at a
    time, at most 2^22 elements on the CPU and 2^27 on a GPU (b1 + b2, if that is more), and
    multiplies it in float32. `pairwise_way` says which ``auto`` takes, and the multiplications of
    each.

    Args:
        x1: float ``(b1, t1, i)``.
        d1: As ``x1``, ``(b1, t1, o)``.
        x2: As ``x1``, ``(b2, t2, i)``.
        d2: As ``x1``, ``(b2, t2, o)``.
        mask1: bool ``(b1, t1)``, tokens that count.
        mask2: bool ``(b2, t2)``, tokens that count.
        way: ``auto``, ``gram`` or ``product``.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(b1, b2)``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes or devices do not fit together, a tensor is part of autograd, or an
            unknown way.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_choice("way", way, _WAYS)
    _check_layer(x1, d1, mask1, names=("x1", "d1", "mask1"))
    check_tensor(
        "x2",
        x2,
        dtypes=(x1.dtype,),
        shape=(None, None, x1.shape[2]),
        device=x1.device,
        strided=True,
    )
    check_tensor(
        "d2",
        d2,
        dtypes=(x1.dtype,),
        shape=(*x2.shape[:2], d1.shape[2]),
        device=x1.device,
        strided=True,
    )
    _check_layer(x2, d2, mask2, names=("x2", "d2", "mask2"))
    return op.pairwise_ghost(x1, d1, x2, d2, mask1, mask2, way, impl)


def kron_cov_(
    a: Tensor,
    s: Tensor,
    x: Tensor,
    d: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Add a batch to the Kronecker factors: ``A += X^T diag(w) X`` and ``S += D^T diag(w) D``.

    Costs ``b t (i^2 + o^2)`` FLOPs on a GPU, where one triangle is computed, twice that on the CPU.
    16-bit inputs are multiplied as they are; with weights a tile at a time is widened, so that no
    weight is rounded to 16 bits. Neither makes a wide copy on a GPU; the CPU widens 8192 tokens at
    a time.

    Args:
        a: float32 (float64 for float64) ``(i, i)`` with any strides; added to.
        s: As ``a``, ``(o, o)``; other memory than ``a``.
        x: float ``(b, t, i)``.
        d: As ``x``, ``(b, t, o)``.
        mask: bool ``(b, t)``, tokens that count.
        weights: As ``a``, ``(b, t)``; a token of weight 0 counts nothing, whatever it holds.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes or devices do not fit together, or a tensor is part of autograd.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    _check_layer(x, d, mask)
    check_out("a", a, (x.shape[2], x.shape[2]), x)
    check_out("s", s, (d.shape[2], d.shape[2]), x)
    if a is s:
        raise ValueError(message("s", "other memory than a", s, "pass a second matrix"))
    if weights is not None:
        check_tensor(
            "weights",
            weights,
            dtypes=(accumulate_dtype(x.dtype),),
            shape=x.shape[:2],
            device=x.device,
            strided=True,
        )
    op.kron_cov_(x, d, a, s, mask, weights, impl)


def kron_sketch(
    x: Tensor,
    d: Tensor,
    seed: int,
    out_rank: int,
    in_rank: int,
    *,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sketch per-sample gradients: ``z_b = vec(R_o^T G_b R_i) = vec((D_b R_o)^T (X_b R_i))``.

    R_o (o, out_rank) and R_i (i, in_rank) hold random signs over the root of their rank. Over the
    seeds ``z_a . z_b`` is ``<G_a, G_b>`` on average. The signs are those of
    `shared_kernels.random.noise`, the same on every device, and a larger rank keeps the columns of
    a smaller one, times ``sqrt(k / k')``. A GPU draws them in registers. Costs
    ``2 b t (i in_rank + o out_rank + in_rank out_rank)`` FLOPs.

    Args:
        x: float ``(b, t, i)``.
        d: As ``x``, ``(b, t, o)``.
        seed: Taken modulo 2^64. Give each layer its own, for instance
            ``shared_kernels.random.derive_seed(seed, layer)``.
        out_rank: Columns of R_o, at least 1.
        in_rank: Columns of R_i, at least 1.
        mask: bool ``(b, t)``, tokens that count.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(b, out_rank * in_rank)``, ``in_rank`` innermost.

    Raises:
        TypeError: A tensor has another dtype than listed, or a rank is no integer.
        ValueError: Shapes or devices do not fit together, a tensor is part of autograd, or a rank
            is out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    _check_layer(x, d, mask)
    check_range("out_rank", out_rank, 1, _MOST_RANK, "pass the number of columns")
    check_range("in_rank", in_rank, 1, _MOST_RANK, "pass the number of columns")
    return op.kron_sketch(x, d, as_int64(seed), out_rank, in_rank, mask, impl)
