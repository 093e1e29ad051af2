"""Public functions: what lies between the matrix products of a perturbed run, as differences."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels._checks import check_choice, check_tensor, message
from shared_kernels.ops.patching import op, reference
from shared_kernels.ops.patching.reference import FP8

_FLOATS = (torch.float32, torch.float64)
_DELTAS = (torch.float32, torch.bfloat16, torch.float64)
_RESULTS = (torch.float32, torch.bfloat16, FP8, torch.float64)
_OPERANDS = (torch.float32, torch.float64, torch.bfloat16, FP8)
_KINDS = ("rms", "layer", "none")
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
#: Both sizes of a weight in fp8 are multiples of it.
_FP8_MULTIPLE = 16


class Rounded(NamedTuple):
    """Numbers of one dtype, in fp8 with a scale for each token.

    Attributes:
        values: ``(..., D)``; where there is a scale, float8_e4m3fn codes of ``value / scale``.
        scale: float32 ``(...)``, or None.
    """

    values: Tensor
    scale: Tensor | None


def _rounded(values: Tensor, scale: Tensor) -> Rounded:
    return Rounded(values, scale if values.dtype == FP8 else None)


def _check_dtype(name: str, dtype: torch.dtype, choices: tuple[torch.dtype, ...]) -> None:
    if dtype not in choices:
        names = " or ".join(str(choice).removeprefix("torch.") for choice in choices)
        raise TypeError(message(name, names, dtype, "pass one of these"))


def _check_outer(name: str, tensor: Tensor, outer: int) -> None:
    """Check that a tensor is contiguous but for its first ``outer`` dimensions."""
    if not tensor[(slice(0, 1),) * outer].is_contiguous():
        expected = f"a tensor with contiguous dimensions after the first {outer}"
        raise ValueError(message(name, expected, tensor, "call .contiguous()"))


def _check_norm(x: Tensor, weight: Tensor | None, kind: str, dtype: torch.dtype) -> None:
    check_choice("kind", kind, _KINDS)
    _check_dtype("dtype", dtype, _RESULTS)
    width = x.shape[-1]
    if not width:
        raise ValueError(message("x", "a width of at least 1", x, "leave the call out"))
    if weight is None:
        return
    if kind == "none":
        raise ValueError(message("weight", "None for kind='none'", weight, "pick another kind"))
    check_tensor("weight", weight, dtypes=(x.dtype,), shape=(width,), device=x.device)


def _check_at(at: Tensor | None, x: Tensor, positions: int) -> None:
    """Check where receivers are read: everywhere, or at one of the positions each."""
    tokens = x.shape[-2]
    if at is not None:
        check_tensor("at", at, dtypes=(torch.int64,), shape=(tokens,), device=x.device)
    elif positions != tokens:
        remedy = f"pass at, or senders of {tokens} tokens"
        raise ValueError(message("at", f"a position for each of {tokens} tokens", at, remedy))


def combine_norm(
    x: Tensor,
    wide: Tensor,
    narrow: Tensor,
    offsets: Tensor,
    entries: Tensor,
    *,
    at: Tensor | None = None,
    weight: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Rounded:
    """Sum the deltas that receivers get, and take them through the norm: Norm(x + a) - Norm(x).

    Errors are in proportion to ``a``, however small it is. Sums are float32, of a receiver's
    entries in their order (float64 if a tensor or ``dtype`` is); results have the same bits in
    every run. Each receiver reads its senders' deltas once, ``D`` numbers each, and as many of x;
    the result is written once. See README.md.

    Args:
        x: float32 ``(G, Q, D)``: what G receivers read in the base run.
        wide: float32 or bfloat16 ``(S1, M, P, D)``: deltas of M rows at all tokens. The first two
            dimensions may be those of a view.
        narrow: ``(S2, M, N, D)``, the same dtype: deltas at one token of each example; a view
            alike. Slots that nobody reads may hold anything.
        offsets: int32 ``(G + 1,)``: receiver g has the entries ``offsets[g]`` to
            ``offsets[g + 1]``; without any its result is 0. Values are not checked, here and below.
        entries: int32 ``(E,)``: ``e >= 0`` is the wide slot e, below 0 the narrow slot ``-1 - e``.
        at: int64 ``(Q,)``: receivers are narrow, ``Q = N``, and receiver token q is token ``at[q]``
            of wide senders. None: receivers are wide, ``Q = P``, and there must be no narrow entry.
        weight: float32 ``(D,)``, the gain of the norm, or None for ones.
        kind: ``rms``; ``layer``, whose shift cancels; or ``none``, the sum itself.
        eps: Of the norm.
        dtype: float32, bfloat16 or float8_e4m3fn (or float64, see above) of the result.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Values ``(G, M, Q, D)``, in fp8 with scales ``(G, M, Q)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes, layouts or devices that do not fit together, or a tensor of an autograd
            graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("x", x, dtypes=_FLOATS, shape=(None, None, None))
    _check_norm(x, weight, kind, dtype)
    (groups, tokens, width), device = x.shape, x.device
    shape = (None, None, None, width)
    check_tensor("wide", wide, dtypes=_DELTAS, shape=shape, device=device, strided=True)
    shape = (None, wide.shape[1], None if at is None else tokens, width)
    check_tensor("narrow", narrow, dtypes=(wide.dtype,), shape=shape, device=device, strided=True)
    _check_outer("wide", wide, 2)
    _check_outer("narrow", narrow, 2)
    _check_at(at, x, wide.shape[2])
    check_tensor("offsets", offsets, dtypes=(torch.int32,), shape=(groups + 1,), device=device)
    check_tensor("entries", entries, dtypes=(torch.int32,), shape=(None,), device=device)
    results = op.combine_norm(
        x, wide, narrow, offsets, entries, at, weight, kind, float(eps), dtype, impl
    )
    return _rounded(*results)


def prefix_norm(
    x: Tensor,
    differences: Tensor,
    picked: Tensor,
    drop: Tensor,
    start: Tensor | None = None,
    *,
    at: Tensor | None = None,
    weight: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Rounded:
    """Take the norm's difference for M trials of one receiver: each lacks one more sender.

    Row m's delta is ``a_m = start - sum of the dropped rows before m - its own difference``, the
    float32 sum in that order (float64 if a tensor or ``dtype`` is), the same bits in every
    implementation; the result is ``Norm(x + a_m) - Norm(x)``, see `combine_norm`. Each difference
    is read once, and each result written once, ``M Q D`` numbers.

    Args:
        x: float32 ``(Q, D)``: what the receiver reads in the base run.
        differences: float32 ``(S, P, D)``: what each sender's removal takes away. The first
            dimension may be that of a view.
        picked: int64 ``(M,)``: which of them each row removes. Values are not checked.
        drop: bool ``(M,)``: whether it stays removed in the rows after that one.
        start: float32 ``(Q, D)``: the delta before the first row, or None for 0.
        at: int64 ``(Q,)``: receiver token q is token ``at[q]`` of the differences; not checked.
            None: ``Q = P``.
        weight: float32 ``(D,)``, the gain of the norm, or None for ones.
        kind: ``rms``; ``layer``, whose shift cancels; or ``none``, the delta itself.
        eps: Of the norm.
        dtype: float32, bfloat16 or float8_e4m3fn (or float64, see above) of the result.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Values ``(M, Q, D)``, in fp8 with scales ``(M, Q)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes, layouts or devices that do not fit together, or a tensor of an autograd
            graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("x", x, dtypes=_FLOATS, shape=(None, None))
    _check_norm(x, weight, kind, dtype)
    (tokens, width), device = x.shape, x.device
    shape = (None, None, width)
    check_tensor(
        "differences", differences, dtypes=_FLOATS, shape=shape, device=device, strided=True
    )
    _check_outer("differences", differences, 1)
    _check_at(at, x, differences.shape[1])
    check_tensor("picked", picked, dtypes=(torch.int64,), shape=(None,), device=device)
    check_tensor("drop", drop, dtypes=(torch.bool,), shape=picked.shape, device=device)
    if len(picked) and not len(differences):
        remedy = "pass the differences that are picked"
        raise ValueError(message("differences", "one or more slots", differences, remedy))
    if start is not None:
        check_tensor("start", start, dtypes=(x.dtype,), shape=(tokens, width), device=device)
    results = op.prefix_norm(
        x, differences, picked, drop, start, at, weight, kind, float(eps), dtype, impl
    )
    return _rounded(*results)


def activation_delta(
    moved: Tensor,
    base: Tensor,
    *,
    act: str,
    gated: bool,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Rounded:
    """Return what activations change by where their inputs change: act(h + dh) - act(h).

    Gated, inputs are ``[gate | up]`` and the result is ``act(g + dg) (u + du) - act(g) u``.
    Computed in float32 (float64 if a tensor or ``dtype`` is) as a plain difference of activations:
    its error is that of float32 at the size of the activations, not of their change; what ``du``
    adds is in proportion to it. Each input is read once, and each result written once; in fp8,
    above 8192 activations, inputs are read twice.

    Args:
        moved: float32 or bfloat16 ``(M, P, F)``, gated ``(M, P, 2 F)``: changes of the inputs.
        base: float32 ``(P, F)``, gated ``(P, 2 F)``: inputs in the base run, with their biases.
        act: ``silu``, ``gelu`` (of the error function), ``gelu_tanh`` or ``relu``.
        gated: Whether there are gates.
        dtype: float32, bfloat16 or float8_e4m3fn (or float64, see above) of the result.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Values ``(M, P, F)``, in fp8 with scales ``(M, P)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, a tensor that is not contiguous, or
            one of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_choice("act", act, _ACTIVATIONS)
    _check_dtype("dtype", dtype, _RESULTS)
    check_tensor("moved", moved, dtypes=_DELTAS, shape=(None, None, None))
    check_tensor("base", base, dtypes=_FLOATS, shape=moved.shape[1:], device=moved.device)
    inputs = base.shape[1]
    if not inputs or (gated and inputs % 2):
        expected = "an even width of at least 2" if gated else "a width of at least 1"
        raise ValueError(message("base", expected, base, "put gate and up side by side"))
    return _rounded(*op.activation_delta(moved, base, act, gated, dtype, impl))


def quantize_rows(weight: Tensor) -> Rounded:
    """Round a weight to fp8 with a scale for each row, as the functions above round tokens.

    Args:
        weight: float32, bfloat16 or float64 ``(O, I)``, taken as float32.

    Returns:
        Codes float8_e4m3fn ``(O, I)`` and scales float32 ``(O,)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Not a matrix, no columns, or a tensor of an autograd graph.
    """
    check_tensor("weight", weight, dtypes=_DELTAS, shape=(None, None), strided=True)
    if not weight.shape[1]:
        raise ValueError(message("weight", "one or more columns", weight, "leave the call out"))
    return Rounded(*reference.rounded(weight.contiguous(), FP8))


def delta_linear(
    delta: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply deltas by a weight: ``delta W^T``. Biases cancel.

    float32 gives float32 (whether in TF32 is for PyTorch's settings to say), float64 gives float64,
    bfloat16 gives bfloat16. fp8 operands are multiplied by PyTorch's scaled product with float32
    accumulation, then by both scales, and rounded to bfloat16; on a CPU in float32, and rounded
    alike.

    Args:
        delta: float32, float64, bfloat16 or float8_e4m3fn ``(..., I)``, contiguous.
        weight: ``(O, I)``, the same dtype; fp8 by `quantize_rows`, O and I multiples of 16.
        scale: float32 ``(...)``, of fp8 deltas.
        weight_scale: float32 ``(O,)``, of an fp8 weight.
        out: ``(..., O)`` of the product's dtype, written and returned; its leading dimensions are
            contiguous.

    Returns:
        ``(..., O)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, a tensor that is not contiguous,
            scales that are missing or too many, or sizes in fp8 that are not multiples of 16.
    """
    check_tensor("weight", weight, dtypes=_OPERANDS, shape=(None, None), strided=True)
    outputs, inputs = weight.shape
    lead, device = delta.shape[:-1], weight.device
    check_tensor("delta", delta, dtypes=(weight.dtype,), shape=(*lead, inputs), device=device)
    if out is not None:
        kind = torch.bfloat16 if weight.dtype == FP8 else weight.dtype
        shape = (*lead, outputs)
        check_tensor("out", out, dtypes=(kind,), shape=shape, device=device, strided=True)
    if weight.dtype != FP8:
        for name, given in (("scale", scale), ("weight_scale", weight_scale)):
            if given is not None:
                remedy = "fold it into the operand"
                raise ValueError(message(name, "None for operands that are not fp8", given, remedy))
        if out is None:
            return F.linear(delta, weight)
        tokens = math.prod(lead)
        torch.mm(delta.view(tokens, inputs), weight.T, out=out.view(tokens, outputs))
        return out
    if scale is None or weight_scale is None:
        name, remedy = "scale" if scale is None else "weight_scale", "pass the scales of the codes"
        raise ValueError(message(name, "a float32 tensor for fp8 codes", None, remedy))
    check_tensor("scale", scale, dtypes=(torch.float32,), shape=lead, device=device)
    shape = (outputs,)
    check_tensor("weight_scale", weight_scale, dtypes=(torch.float32,), shape=shape, device=device)
    if outputs % _FP8_MULTIPLE or inputs % _FP8_MULTIPLE:
        expected = f"sizes that are multiples of {_FP8_MULTIPLE} in fp8"
        raise ValueError(message("weight", expected, weight, "pad it or use bfloat16"))
    codes = delta.view(math.prod(lead), inputs)
    product = _scaled_product(codes, weight, scale.view(-1, 1), weight_scale)
    product = product.view(*lead, outputs)
    return product if out is None else out.copy_(product)


def _scaled_product(codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Multiply fp8 codes ``(T, I)`` by those of a weight ``(O, I)``, in bfloat16."""
    if codes.device.type == "cuda" and codes.numel() and weight.numel():
        rows = F.ScalingType.RowWise
        return F.scaled_mm(
            codes, weight.T, scale, rows, weight_scale[None], rows,
            output_dtype=torch.bfloat16, use_fast_accum=False,
        )  # fmt: skip
    product = codes.float() @ weight.float().T
    return (product * scale * weight_scale).to(torch.bfloat16)
