"""Public function: log-probabilities of tokens under a linear head."""

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.lm_head import op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LinearLogprob(NamedTuple):
    """What a head says.

    Attributes:
        logprob: float ``(R,)``, of the targets.
        lse: float ``(U,)``, natural log-sum-exp of each row's logits.
        argmax: int64 ``(U,)``, the likeliest token; of equal ones the lowest.
        entropy: float ``(U,)`` in nats, or None if not asked for.
        top_logprobs: float ``(U, k)``, the k largest, descending.
        top_indices: int64 ``(U, k)``, their tokens; equal ones in any order.
    """

    logprob: Tensor
    lse: Tensor
    argmax: Tensor
    entropy: Tensor | None
    top_logprobs: Tensor
    top_indices: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    top_k: int = 0,
    impl: str = "auto",
) -> LinearLogprob:
    """Compute log-probabilities under ``softmax(z)``, ``z = s (h W^T + b)``, soft-capped if asked.

    Logits and sums are float32 (float64 for float64), also for 16-bit inputs, and only a block of
    logits exists at a time: 128 MB, or 64 MB by the reference. Several targets may share a row,
    whose logits are then computed once. ``2 U V d`` FLOPs.

    Args:
        hidden: float ``(U, d)``, final hidden states.
        weight: float ``(V, d)``, the head.
        targets: int64 ``(R,)``, tokens.
        rows: int64 ``(R,)``, the row of each target; by default target r has row r.
        bias: float ``(V,)``.
        scale: Of the products, before the cap.
        softcap: Logits become ``softcap tanh(logit / softcap)``.
        entropy: Compute the entropy of each row.
        top_k: How many of the likeliest tokens to return.
        impl: ``auto``, ``triton`` (matrix library and a kernel) or ``reference``.

    Raises:
        TypeError: A tensor has a dtype that is not listed.
        ValueError: Shapes or devices do not fit together, a tensor is part of an autograd graph, or
            an option is out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("hidden", hidden, dtypes=_DTYPES, shape=(None, None), strided=True)
    device, (count, width) = hidden.device, hidden.shape
    check_tensor(
        "weight", weight, dtypes=(hidden.dtype,), shape=(None, width), device=device, strided=True
    )
    check_tensor("targets", targets, dtypes=(torch.int64,), shape=(None,), device=device)
    if rows is None:
        if targets.shape[0] != count:
            remedy = "pass rows to say which row each belongs to"
            raise ValueError(message("targets", f"{count} targets, one per row", targets, remedy))
        rows = torch.arange(count, device=device)
    check_tensor("rows", rows, dtypes=(torch.int64,), shape=targets.shape, device=device)
    if bias is not None:
        check_tensor("bias", bias, dtypes=_DTYPES, shape=weight.shape[:1], device=device)
    if not weight.shape[0]:
        raise ValueError(message("weight", "at least one token", weight, "pass the head's weight"))
    if softcap is not None and not softcap > 0:
        raise ValueError(message("softcap", "a positive number or None", softcap, "leave it out"))
    check_range("top_k", top_k, 0, weight.shape[0] + 1, "ask for at most the vocabulary")
    logprob, lse, argmax, entropies, values, indices = op.linear_logprob(
        hidden, weight, targets, rows, bias, float(scale), softcap, entropy, top_k, impl
    )
    return LinearLogprob(logprob, lse, argmax, entropies if entropy else None, values, indices)
