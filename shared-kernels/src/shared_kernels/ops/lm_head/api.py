"""Public functions: log-probabilities of tokens under a linear head, and its entropy."""

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.lm_head import op
from shared_kernels.ops.lm_head.reference import finish

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Rows whose tokens' rows of the head are gathered at a time.
_PICKED = 1024


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
    _check_head(hidden, weight, bias, softcap)
    device, count = hidden.device, hidden.shape[0]
    check_tensor("targets", targets, dtypes=(torch.int64,), shape=(None,), device=device)
    if rows is None:
        if targets.shape[0] != count:
            remedy = "pass rows to say which row each belongs to"
            raise ValueError(message("targets", f"{count} targets, one per row", targets, remedy))
        rows = torch.arange(count, device=device)
    check_tensor("rows", rows, dtypes=(torch.int64,), shape=targets.shape, device=device)
    check_range("top_k", top_k, 0, weight.shape[0] + 1, "ask for at most the vocabulary")
    logprob, lse, argmax, entropies, values, indices = op.linear_logprob(
        hidden, weight, targets, rows, bias, float(scale), softcap, entropy, top_k, impl
    )
    return LinearLogprob(logprob, lse, argmax, entropies if entropy else None, values, indices)


class LinearEntropy(NamedTuple):
    """How sure a head is.

    Attributes:
        entropy: float ``(N,)`` in nats.
        lse: float ``(N,)``, natural log-sum-exp of each row's logits.
        logprob: float ``(N,)``, of ``token_ids``, or None.
        watched: float ``(N, W)``, log-probabilities of ``watch_ids``, or None.
    """

    entropy: Tensor
    lse: Tensor
    logprob: Tensor | None
    watched: Tensor | None


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
    watch_ids: Tensor | None = None,
    impl: str = "auto",
) -> LinearEntropy:
    """Compute the entropy of ``softmax(z / temperature)``, ``z = softcap(scale (h W^T + b))``.

    Logits are never stored: a row keeps its largest logit m, ``s = sum e^(z - m)`` and
    ``u = sum (z - m) e^(z - m)``, and ``H = log s - u / s``. Sums are float32, also for 16-bit
    inputs, and float64 for float64. ``2 N V d`` FLOPs; a wave of programs reads the head once.

    Args:
        hidden: float ``(N, d)``, final hidden states.
        weight: float ``(V, d)``, the head.
        bias: float ``(V,)``.
        scale: Of the products, before the cap.
        softcap: Logits become ``softcap tanh(logit / softcap)``.
        temperature: Of the distribution.
        token_ids: int64 ``(N,)``, a token of each row whose log-probability is wanted.
        watch_ids: int64 ``(W,)``, tokens whose log-probability is wanted in every row.
        impl: ``auto``, ``triton``, ``split`` (blocks in plain torch) or ``reference``.

    Raises:
        TypeError: A tensor has a dtype that is not listed.
        ValueError: Shapes or devices do not fit together, a tensor is part of an autograd graph
            (there is no backward), or an option is out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    _check_head(hidden, weight, bias, softcap)
    if not temperature > 0:
        raise ValueError(message("temperature", "a positive number", temperature, "1 is usual"))
    device, count = hidden.device, hidden.shape[0]
    # softcap(s x) / T has the same form
    scale, cap = scale / temperature, None if softcap is None else softcap / temperature
    entropy, lse = op.linear_entropy(hidden, weight, bias, float(scale), cap, impl)

    def logits(rows: Tensor, ids: Tensor) -> Tensor:
        found = (rows.to(lse.dtype) * weight[ids].to(lse.dtype)).sum(-1)
        return finish(found, None if bias is None else bias[ids], scale, cap)

    logprob = watched = None
    if token_ids is not None:
        check_tensor("token_ids", token_ids, dtypes=(torch.int64,), shape=(count,), device=device)
        # a chunk at a time: a row of the head for each
        found = [
            logits(hidden[low : low + _PICKED], token_ids[low : low + _PICKED])
            for low in range(0, count, _PICKED)
        ]
        logprob = (torch.cat(found) if found else lse) - lse
    if watch_ids is not None:
        check_tensor("watch_ids", watch_ids, dtypes=(torch.int64,), shape=(None,), device=device)
        columns = [logits(hidden, token) - lse for token in watch_ids]
        watched = torch.stack(columns, -1) if columns else lse.new_empty(count, 0)
    return LinearEntropy(entropy, lse, logprob, watched)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Refuse what is no head, or does not fit the states."""
    check_tensor("hidden", hidden, dtypes=_DTYPES, shape=(None, None), strided=True)
    device, width = hidden.device, hidden.shape[1]
    check_tensor(
        "weight", weight, dtypes=(hidden.dtype,), shape=(None, width), device=device, strided=True
    )
    if bias is not None:
        check_tensor("bias", bias, dtypes=_DTYPES, shape=weight.shape[:1], device=device)
    if not weight.shape[0]:
        raise ValueError(message("weight", "at least one token", weight, "pass the head's weight"))
    if softcap is not None and not softcap > 0:
        raise ValueError(message("softcap", "a positive number or None", softcap, "leave it out"))
