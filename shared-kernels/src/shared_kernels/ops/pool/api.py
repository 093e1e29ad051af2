"""Public functions: softmax-weighted means of hidden states, and predictions from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels._checks import check_tensor, message
from shared_kernels.ops.pool import op, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SUMS = (torch.float32, torch.float64)


class PoolState(NamedTuple):
    """B means that may go on: states of pieces merge, in any order.

    Attributes:
        peak: float ``(B,)``, the largest score; -inf where nothing has been seen.
        total: float ``(B,)``, ``sum e^(score - peak)``.
        weighted: float ``(B, d)``, ``sum e^(score - peak) h``.
    """

    peak: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def empty(
        cls,
        count: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PoolState:
        """Return ``count`` means of nothing."""
        return cls(
            torch.full((count,), float("-inf"), dtype=dtype, device=device),
            torch.zeros(count, dtype=dtype, device=device),
            torch.zeros(count, width, dtype=dtype, device=device),
        )

    def merge(self, other: PoolState) -> PoolState:
        """Return the state of the tokens of both."""
        return PoolState(*reference.merge(self, other))

    def pooled(self) -> Tensor:
        """Return the means ``(B, d)``; zeros where nothing has been seen."""
        return self.weighted / torch.where(self.total == 0, 1.0, self.total)[:, None]


def segment_softmax_pool(
    hidden: Tensor,
    score: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    impl: str = "auto",
) -> PoolState:
    """Weigh the states of each segment by the softmax of their scores.

    ``sum_i e^(score_i) h_i / sum_i e^(score_i)`` is ``pooled()`` of what is returned. Sums are
    float32 (float64 for float64) and their order does not depend on other segments. Each state is
    read once, ``T d`` numbers; those outside the mask are not read and may hold anything.

    Args:
        hidden: float ``(T, d)``, packed segments.
        score: float ``(T,)``.
        cu_seqlens: int64 ``(B + 1,)``, bounds from 0 to T; equal ones make an empty segment.
        mask: bool ``(T,)``, the tokens that count.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, or a tensor of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("hidden", hidden, dtypes=_DTYPES, shape=(None, None), strided=True)
    device, count = hidden.device, hidden.shape[0]
    check_tensor("score", score, dtypes=_DTYPES, shape=(count,), device=device)
    check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int64,), shape=(None,), device=device)
    if not len(cu_seqlens):
        raise ValueError(message("cu_seqlens", "at least one bound", cu_seqlens, "begin with 0"))
    if mask is None:
        mask = torch.ones(count, dtype=torch.bool, device=device)
    check_tensor("mask", mask, dtypes=(torch.bool,), shape=(count,), device=device)
    return PoolState(*op.softmax_segment_sums(hidden, score, cu_seqlens, mask, impl))


class StepHead(NamedTuple):
    """``softmax(W2 relu(LayerNorm(W1 x + b1)) + b2)`` with the part of W1 that sees a step.

    Attributes:
        weight: float ``(p, 2 d + n)``, the columns of W1 for ``[mean ; h ; numbers]``.
        gain: float ``(p,)``, of the norm.
        shift: float ``(p,)``, of the norm.
        out_weight: float ``(K, p)``.
        out_bias: float ``(K,)``.
        eps: Of the norm.
    """

    weight: Tensor
    gain: Tensor
    shift: Tensor
    out_weight: Tensor
    out_bias: Tensor
    eps: float = 1e-5


def plp_step(
    state: PoolState,
    hidden: Tensor,
    score: Tensor,
    numbers: Tensor,
    active: Tensor,
    features: Tensor,
    *,
    prompt: Tensor | None = None,
    head: StepHead | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """Add one token to each row's mean, in place, and predict from what has been seen.

    Two launches and a product (one launch without a head), whatever the length of the answer; the
    host asks the device nothing, so the call can be part of a CUDA graph.

    Args:
        state: B means, written.
        hidden: float ``(B, d)``, states of the newest tokens.
        score: float ``(B,)``, their scores.
        numbers: float32 ``(B, n)``, what else is known of the step.
        active: bool ``(B,)``; the other rows stay as they are, whatever their tokens hold.
        features: float ``(B, 2 d + n)``, written: ``[mean ; h ; numbers]``.
        prompt: float ``(B, p)``, ``W_p x_p + b1`` of each row's prompt.
        head: The rest of the head; without it nothing is predicted.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float ``(B, K)``, probabilities, or None without a head.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("hidden", hidden, dtypes=_DTYPES, shape=(None, None), strided=True)
    (rows, width), device = hidden.shape, hidden.device
    check_tensor("state.peak", state.peak, dtypes=_SUMS, shape=(rows,), device=device)
    check_tensor("state.weighted", state.weighted, dtypes=_SUMS, shape=(rows, width), device=device)
    check_tensor("score", score, dtypes=_DTYPES, shape=(rows,), device=device)
    check_tensor("numbers", numbers, dtypes=_SUMS, shape=(rows, None), device=device)
    check_tensor("active", active, dtypes=(torch.bool,), shape=(rows,), device=device)
    shape = (rows, 2 * width + numbers.shape[1])
    check_tensor("features", features, dtypes=_DTYPES, shape=shape, device=device)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    op.plp_update_(*state, hidden, score, numbers, active, features, impl)
    if head is None:
        return None
    if prompt is None:
        raise ValueError(message("prompt", "its share of the first layer", prompt, "give both"))
    inner = torch.addmm(prompt, features, head.weight.T)
    return op.plp_output(
        inner, head.gain, head.shift, head.out_weight, head.out_bias, head.eps, impl
    )
