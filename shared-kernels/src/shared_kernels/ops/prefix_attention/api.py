"""Public functions: attention over a shared prefix, and the merge of attention states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared_kernels._checks import check_tensor, message
from shared_kernels.ops.prefix_attention import launch, op
from shared_kernels.ops.prefix_attention.layout import PrefixLayout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from packed rows to a prefix that is held once, to ancestors, and to themselves.

    One softmax over all keys that a query sees, as if each row had a copy of them. Heads of a group
    share keys (GQA): query head ``h`` reads key head ``h // (Hq / Hkv)``. Sums are float32 (float64
    for float64). Deterministic; under ``impl="triton"`` the result of a row has the same bits
    whatever other rows are packed with it. Reads each key once per tile of 128 queries and heads of
    a group; 4 FLOPs per query, head, visible key and dimension; no copy of any key.

    Args:
        q: float ``(T, Hq, D)``, rows end to end.
        k: ``(K, Hkv, D)``, packed keys, after their position embedding.
        v: ``(K, Hkv, Dv)``.
        shared_k: ``(M, Hkv, D)``, keys that many rows see.
        shared_v: ``(M, Hkv, Dv)``.
        layout: What each row sees.
        scale: Of the inner products, positive; ``D ** -0.5`` by default.
        window: Keys ``window`` or more positions behind a query are hidden (sliding window).
        softcap: Logits become ``softcap tanh(logit / softcap)``.
        sinks: float ``(Hq,)``, a logit per head that joins the softmax with value 0.
        impl: ``auto``, ``triton``, ``split`` (plain torch, dense calls and merges) or
            ``reference``.

    Returns:
        Output ``(T, Hq, Dv)`` in q's dtype, and the natural log-sum-exp ``(T, Hq)``, float32, sinks
        included. A query that sees nothing gets 0 and -inf.

    Raises:
        TypeError: A tensor has a dtype that is not listed, or not q's.
        ValueError: Shapes or devices do not fit together, the layout reaches beyond the tensors, a
            tensor is part of an autograd graph, or an option is not positive.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("q", q, dtypes=_DTYPES, shape=(layout.queries, None, None), strided=True)
    _, heads, dim = q.shape
    check = {"dtypes": (q.dtype,), "device": q.device, "strided": True}
    check_tensor("k", k, shape=(None, None, dim), **check)
    check_tensor("v", v, shape=(k.shape[0], k.shape[1], None), **check)
    check_tensor("shared_k", shared_k, shape=(None, k.shape[1], dim), **check)
    check_tensor("shared_v", shared_v, shape=(shared_k.shape[0], *v.shape[1:]), **check)
    if not k.shape[1] or heads % k.shape[1]:
        remedy = "query heads must be a multiple of key heads"
        raise ValueError(message("q", f"a multiple of {k.shape[1]} heads", q, remedy))
    if sinks is not None:
        check_tensor("sinks", sinks, dtypes=_DTYPES, shape=(heads,), device=q.device, strided=True)
    for name, reach, keys in zip(("k", "shared_k"), layout.extent, (k, shared_k), strict=True):
        if reach > keys.shape[0]:
            remedy = "build the layout for these keys"
            raise ValueError(
                message(name, f"at least the {reach} keys of the layout", keys, remedy)
            )
    for name, option in (("scale", scale), ("window", window), ("softcap", softcap)):
        if option is not None and not option > 0:
            raise ValueError(message(name, "a positive number or None", option, "leave it out"))
    return op.prefix_attention(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, shared_k, shared_v)),
        *launch.tables(layout, q, k, v),
        layout.rows,
        dim**-0.5 if scale is None else float(scale),
        window,
        softcap,
        sinks,
        impl,
    )


def merge_attention_states(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    *,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge the attention of the same queries over disjoint sets of keys.

    ``lse = log(Σ e^lse_i [+ e^sink])``, ``out = Σ e^(lse_i - lse) out_i``, as one softmax over all
    keys would give. Log-sum-exps are natural; some kernels of other libraries give them to base 2:
    multiply those by ``log 2`` first. Reads every state once; sums are float32, or float64.

    Args:
        outs: One or more float ``(T, H, Dv)``.
        lses: As many ``(T, H)``, float32 (float64 for float64); -inf where a set is empty for a
            query, and then its output may hold anything.
        sinks: float ``(H,)``, a logit per head that joins once, with value 0.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Output ``(T, H, Dv)`` in the dtype of the first, and log-sum-exp ``(T, H)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: No states, different numbers of outputs and log-sum-exps, or shapes and devices
            that do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    if not outs or len(outs) != len(lses):
        remedy = "pass one log-sum-exp per output"
        raise ValueError(message("outs", f"{max(1, len(lses))} outputs", len(outs), remedy))
    first = outs[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    for out, lse in zip(outs, lses, strict=True):
        check_tensor("outs", out, dtypes=_DTYPES, shape=(None, None, None), strided=True)
        if out.shape != first.shape or out.dtype != first.dtype:
            wanted = f"the dtype and shape {tuple(first.shape)} of the first"
            raise ValueError(message("outs", wanted, out, "give states of the same queries"))
        check_tensor(
            "lses", lse, dtypes=(wide,), shape=first.shape[:2], device=first.device, strided=True
        )
    if sinks is not None:
        check_tensor("sinks", sinks, dtypes=_DTYPES, shape=(first.shape[1],), device=first.device)
    states = ([x.contiguous() for x in part] for part in (outs, lses))
    return op.merge_states(*states, sinks, impl)
