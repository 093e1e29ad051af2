"""Registration of the attention."""

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.patching.attention import launch, reference


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    kv: Tensor,
    at: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    heads, *rest = base.shape
    return q.new_empty(heads, reference.count_rows(q, k, v), *rest, dtype=dtype)


suffix_attention = declare(
    "suffix_attention(Tensor q, Tensor k, Tensor v, Tensor base, Tensor kv, Tensor? at,"
    " float scale, SymInt? window, float? softcap, bool causal, ScalarType dtype) -> Tensor",
    implementations={
        "reference": reference.suffix_attention,
        "triton": launch.suffix_attention,
    },
    fake=_fake,
    unsupported=launch.unsupported,
)
