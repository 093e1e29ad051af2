"""Public functions of the family: norms, clipped sums and plain sums of privacy units.

Throughout, ``cu_seqlens`` is int32 ``(U + 1,)``: 0 first, the number of rows N last, never
decreasing; unit i holds the rows ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, perhaps none. It
stays on the device: nothing waits for its values, so on a GPU they are the caller's promise (on the
CPU they are checked). Matrices may have any strides and are not copied, tensors must lie outside
autograd. Accumulation is float32 (float64 for float64) and never TF32, sums run in a fixed order:
equal calls give equal bits. Float64 has no Triton kernel.
"""

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor
from shared_kernels.ops.dp import arguments, op, reference


def segment_gram_norm(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: bool = False,
    max_seqlen: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Squared norms of the units' weight gradients ``G_i^T A_i`` from Gram matrices.

    ``n2_i = sum_{t,s} (<a_t, a_s> (+ 1)) <g_t, g_s>`` over the rows t, s of unit i. Rounding can
    take ``n2`` below the true value, even below 0, where tokens cancel: add `gram_error_bound`
    before clipping. Costs ``U T^2 (d + p)`` FLOPs and one read of both matrices; a Gram matrix
    is never stored on a GPU.

    Args:
        a: float32, bfloat16, float16 or float64 ``(N, d)``, the layer's inputs.
        g: As ``a``, ``(N, p)``, the gradients of its outputs.
        cu_seqlens: int32 ``(U + 1,)``.
        bias: Count the bias's gradient in.
        max_seqlen: Rows of the longest unit. A hint: no value makes a result wrong.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``n2`` and the same sum of absolute values, float32 (float64 for float64) ``(U,)``. A trace
        added to the latter, `reference.LOST`, covers inner products that underflow.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_pair(a, g)
    arguments.check_units(cu_seqlens, g)
    arguments.check_length(max_seqlen)
    return op.gram_norm(a, g, cu_seqlens, bias, max_seqlen, impl)


def segment_token_gram_norm(
    tokens: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    *,
    padding_idx: int | None = None,
    max_seqlen: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Squared norms of the units' gradients of an embedding table.

    ``n2_i = sum <g_t, g_s>`` over the pairs of unit i's rows with the same token: as
    `segment_gram_norm` with one-hot inputs, which are never formed.

    Args:
        tokens: int64 or int32 ``(N,)``.
        g: float32, bfloat16, float16 or float64 ``(N, h)``, the gradients of the rows looked up.
        cu_seqlens: int32 ``(U + 1,)``.
        padding_idx: A token whose rows count nothing, whatever they hold.
        max_seqlen: Rows of the longest unit, a hint.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``n2`` and the same sum of absolute values, float32 (float64 for float64) ``(U,)``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_tokens(tokens, g)
    arguments.check_units(cu_seqlens, g)
    arguments.check_length(max_seqlen)
    return op.token_gram_norm(tokens, g, cu_seqlens, padding_idx, max_seqlen, impl)


def gram_error_bound(absolute: Tensor, cu_seqlens: Tensor, features: int, outputs: int) -> Tensor:
    """Bound the rounding error of `segment_gram_norm` and `segment_token_gram_norm`.

    ``(sqrt d + sqrt p + sqrt T_i + (d + p) 5/32) 2^-23 absolute_i``. Rounding errors of a sum of k
    terms add up like a random walk, sqrt(k) half-units each, and twice that is allowed. Tensor
    cores do not round but cut off, which is a drift: of each step of 16 products and the running
    sum, at most 16 quarter units and one. Where all terms have one sign the running sum is half the
    final one on average. ``n2`` plus this bound is not below the true value.

    Args:
        absolute: float32 or float64 ``(U,)``, what the norm returned beside ``n2``.
        cu_seqlens: int32 ``(U + 1,)``.
        features: Columns d of the inputs; 0 for tokens, whose comparison is exact.
        outputs: Columns p of the gradients.

    Returns:
        Like ``absolute``.
    """
    return reference.certified_norm(
        torch.zeros_like(absolute), absolute, cu_seqlens, features, outputs
    )


def certified_norm(
    n2: Tensor,
    absolute: Tensor,
    cu_seqlens: Tensor,
    features: int,
    outputs: int,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return ``max(n2, 0) + gram_error_bound(absolute, ...)``: never below the true norm.

    Args:
        n2: float32 or float64 ``(U,)``, of `segment_gram_norm` or `segment_token_gram_norm`.
        absolute: Like ``n2``, what was returned beside it.
        cu_seqlens: int32 ``(U + 1,)``.
        features: Columns d of the inputs; 0 for tokens.
        outputs: Columns p of the gradients.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Like ``n2``; not finite where ``absolute`` is not.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes or devices do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("n2", n2, dtypes=(torch.float32, torch.float64), shape=(None,))
    check_tensor("absolute", absolute, dtypes=(n2.dtype,), shape=n2.shape, device=n2.device)
    check_tensor(
        "cu_seqlens", cu_seqlens, dtypes=(torch.int32,), shape=(len(n2) + 1,), device=n2.device
    )
    return op.certified_norm(n2, absolute, cu_seqlens, features, outputs, impl)


def segment_mm_norm(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: bool = False,
    row_multiple: int = 1,
    impl: str = "auto",
) -> Tensor:
    """Squared norms of the units' weight gradients ``G_i^T A_i``, each formed and thrown away.

    Costs ``2 N d p`` FLOPs, as much as the gradient itself; on a GPU no product leaves registers.

    Args:
        a: float32, bfloat16, float16 or float64 ``(N, d)``, the layer's inputs.
        g: As ``a``, ``(N, p)``, the gradients of its outputs.
        cu_seqlens: int32 ``(U + 1,)``.
        bias: Count the bias's gradient in.
        row_multiple: Promise that every boundary is a multiple of this: with multiples of 16 (best
            of 64) of 16-bit rows a GPU from Hopper on is faster. A broken promise gives NaN there,
            an error on the CPU.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(U,)``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_pair(a, g)
    arguments.check_units(cu_seqlens, g)
    arguments.check_multiple(row_multiple, cu_seqlens)
    return op.mm_norm(a, g, cu_seqlens, bias, row_multiple, impl)


def segment_scaled_mm(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    bias_out: Tensor | None = None,
    row_multiple: int = 1,
    impl: str = "auto",
) -> None:
    """Add ``sum_i scale_i G_i^T A_i`` to ``out``.

    The scale multiplies float32 values, never 16-bit ones. A unit with scale 0 adds nothing, even
    if its rows hold NaN or infinities. Costs ``2 N d p`` FLOPs.

    Args:
        a: float32, bfloat16, float16 or float64 ``(N, d)``, the layer's inputs.
        g: As ``a``, ``(N, p)``, the gradients of its outputs.
        cu_seqlens: int32 ``(U + 1,)``.
        scale: float32 (float64 for float64) ``(U,)``.
        out: As ``scale``, ``(p, d)`` with any strides, for instance transposed; added to.
        bias_out: As ``scale``, ``(p,)``; ``sum_i scale_i sum_t g_t`` is added to it.
        row_multiple: Promise that every boundary is a multiple of this: with multiples of 16 (best
            of 64) of 16-bit rows a GPU from Hopper on is faster. A broken promise gives NaN there,
            an error on the CPU.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_pair(a, g)
    arguments.check_units(cu_seqlens, g)
    arguments.check_scale(scale, cu_seqlens, g)
    _check_outs(a, g, out, bias_out)
    arguments.check_multiple(row_multiple, cu_seqlens)
    op.scaled_mm_(a, g, cu_seqlens, scale, out, bias_out, row_multiple, impl)


def _check_outs(a: Tensor, g: Tensor, out: Tensor, bias_out: Tensor | None) -> None:
    arguments.check_out("out", out, (g.shape[1], a.shape[1]), g)
    if bias_out is not None:
        arguments.check_out("bias_out", bias_out, (g.shape[1],), g)


def clip_factors(
    n2: Tensor,
    threshold: float | Tensor,
    clipping: str = "abadi",
    stability: float = 0.01,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return what the units' gradients are multiplied by, from their squared norms.

    With ``n = sqrt(n2)``: ``abadi`` is ``min(1, C / n)``, ``automatic`` is ``C / (n + stability)``,
    each times ``1 - 2^-16``, so that rounding never takes a clipped gradient over C; an infinite C
    is not shrunk, and gives exactly 1. A norm that is not finite, or a negative ``n2``, gives 0.

    Args:
        n2: float32 or float64 ``(U,)``.
        threshold: C, positive; or a scalar tensor like ``n2``, which is not checked.
        clipping: ``abadi`` or ``automatic``.
        stability: Added to the norm by ``automatic``.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Like ``n2``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: An option is out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("n2", n2, dtypes=(torch.float32, torch.float64), shape=(None,))
    threshold = arguments.as_threshold(threshold, clipping, stability, n2)
    return op.clip_factors(n2, threshold, clipping, float(stability), impl)


def segment_mm_clip(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    threshold: float | Tensor,
    out: Tensor,
    *,
    bias_out: Tensor | None = None,
    clipping: str = "abadi",
    stability: float = 0.01,
    chunk: int | None = None,
    max_seqlen: int | None = None,
    equal: bool = False,
    accumulate: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Norms, `clip_factors` and the clipped sum in one pass over the units' gradients.

    For ``chunk`` units at a time, the products ``G_i^T A_i`` are written out in float32 and read
    for ``out += sum_i c_i G_i^T A_i``: ``2 N d p`` FLOPs and ``(8 + 8 / chunk) U p d`` bytes. Norms
    are taken while writing for 16-bit rows on Hopper and later, if N / U is a multiple of 16; else
    they are read once more, ``4 U p d`` bytes. A unit whose norm is not finite adds nothing.

    Args:
        a: float32, bfloat16, float16 or float64 ``(N, d)``, the layer's inputs.
        g: As ``a``, ``(N, p)``, the gradients of its outputs.
        cu_seqlens: int32 ``(U + 1,)``.
        threshold: C, positive; or a scalar tensor like ``out``, which is not checked.
        out: float32 (float64 for float64) ``(p, d)`` with any strides; added to, or written.
        bias_out: As ``out``, ``(p,)``: the bias's gradient, counted in the norm and added here.
        clipping: ``abadi`` or ``automatic``, see `clip_factors`.
        stability: Added to the norm by ``automatic``.
        chunk: Units at a time on a GPU; None takes as many as fit 1 GiB, at least one. The CPU
            takes one.
        max_seqlen: Rows of the longest unit: where the units are not ``equal`` a GPU needs it, and
            leaves out rows beyond it.
        equal: Promise that all units have N / U rows.
        accumulate: False writes over ``out``, which may be unwritten memory, instead of adding to
            it: 4 p d bytes less read. ``bias_out`` is added to all the same.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Squared norms, float32 (float64 for float64) ``(U,)``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices, layouts or options do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_pair(a, g)
    arguments.check_units(cu_seqlens, g)
    _check_outs(a, g, out, bias_out)
    arguments.check_length(max_seqlen)
    arguments.check_equal(equal, g, cu_seqlens)
    if chunk is not None:
        check_range("chunk", chunk, 1, 1 << 31, "pass a number of units, or None")
    threshold = arguments.as_threshold(threshold, clipping, stability, g)
    return op.mm_clip_(
        a,
        g,
        cu_seqlens,
        threshold,
        out,
        bias_out,
        clipping,
        float(stability),
        chunk,
        max_seqlen,
        equal,
        accumulate,
        impl,
    )


def segment_gram_clip(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    threshold: float | Tensor,
    out: Tensor,
    *,
    bias_out: Tensor | None = None,
    clipping: str = "abadi",
    stability: float = 0.01,
    max_seqlen: int | None = None,
    row_multiple: int = 1,
    impl: str = "auto",
) -> Tensor:
    """Certified Gram norms, `clip_factors` and the clipped sum in one call.

    As `segment_gram_norm`, `certified_norm`, `clip_factors` and `segment_scaled_mm` one after the
    other, with fewer launches on a GPU. A unit whose norm is not finite adds nothing.

    Args:
        a: float32, bfloat16, float16 or float64 ``(N, d)``, the layer's inputs.
        g: As ``a``, ``(N, p)``, the gradients of its outputs.
        cu_seqlens: int32 ``(U + 1,)``.
        threshold: C, positive; or a scalar tensor like ``out``, which is not checked.
        out: float32 (float64 for float64) ``(p, d)`` with any strides; added to.
        bias_out: As ``out``, ``(p,)``: the bias's gradient, counted in the norm and added here.
        clipping: ``abadi`` or ``automatic``, see `clip_factors`.
        stability: Added to the norm by ``automatic``.
        max_seqlen: Rows of the longest unit, a hint.
        row_multiple: See `segment_scaled_mm`.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Certified squared norms, float32 (float64 for float64) ``(U,)``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices, layouts or options do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_pair(a, g)
    arguments.check_units(cu_seqlens, g)
    _check_outs(a, g, out, bias_out)
    arguments.check_length(max_seqlen)
    arguments.check_multiple(row_multiple, cu_seqlens)
    threshold = arguments.as_threshold(threshold, clipping, stability, g)
    return op.gram_clip_(
        a,
        g,
        cu_seqlens,
        threshold,
        out,
        bias_out,
        clipping,
        float(stability),
        max_seqlen,
        row_multiple,
        impl,
    )


def segment_sums(x: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """Sum the rows of each unit.

    Args:
        x: float32, bfloat16, float16 or float64 ``(N, h)``.
        cu_seqlens: int32 ``(U + 1,)``.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(U, h)``; 0 for a unit without rows.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_rows("x", x)
    arguments.check_units(cu_seqlens, x)
    return op.sums(x, None, cu_seqlens, impl)


def segment_product_sums(x: Tensor, g: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """Sum ``x * g``, multiplied after widening, over the rows of each unit.

    With normalised inputs ``x`` this is the units' gradients of a norm layer's weight.

    Args:
        x: float32, bfloat16, float16 or float64 ``(N, h)``.
        g: As ``x``.
        cu_seqlens: int32 ``(U + 1,)``.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float32 (float64 for float64) ``(U, h)``; 0 for a unit without rows.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_rows("x", x)
    check_tensor("g", g, dtypes=(x.dtype,), shape=x.shape, device=x.device, strided=True)
    arguments.check_units(cu_seqlens, x)
    return op.sums(x, g, cu_seqlens, impl)


def embedding_accumulate(
    tokens: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    padding_idx: int | None = None,
    impl: str = "auto",
) -> None:
    """Add each row of ``g``, times its unit's scale, to the row of ``out`` its token names.

    A unit with scale 0 adds nothing, even if its rows hold NaN or infinities.

    Args:
        tokens: int64 or int32 ``(N,)``, in [0, V): else an error on the CPU, left out on a GPU.
        g: float32, bfloat16, float16 or float64 ``(N, h)``.
        cu_seqlens: int32 ``(U + 1,)``.
        scale: float32 (float64 for float64) ``(U,)``.
        out: As ``scale``, ``(V, h)`` with any strides; added to.
        padding_idx: A token whose rows are left out.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices or layouts do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    arguments.check_tokens(tokens, g)
    arguments.check_units(cu_seqlens, g)
    arguments.check_scale(scale, cu_seqlens, g)
    arguments.check_out("out", out, (None, g.shape[1]), g)
    op.embedding_accumulate_(tokens, g, cu_seqlens, scale, out, padding_idx, impl)
