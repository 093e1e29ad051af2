"""Registration of the attention ops."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.prefix_attention import launch, reference, split


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor, shared_v: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate_dtype(q.dtype)
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[0], q.shape[1], dtype=dtype),
    )


def _fake_merge(outs: list[Tensor], lses: list[Tensor], sinks: Tensor | None) -> Any:
    dtype = reference.accumulate_dtype(outs[0].dtype)
    return torch.empty_like(outs[0]), outs[0].new_empty(outs[0].shape[:-1], dtype=dtype)


prefix_attention = declare(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor shared_k, Tensor shared_v, Tensor lanes,"
    " Tensor tiles, Tensor blocks, Tensor rows, float scale, SymInt? window, float? softcap,"
    " Tensor? sinks) -> (Tensor, Tensor)",
    implementations={
        "reference": reference.prefix_attention,
        "split": split.prefix_attention,
        "triton": launch.prefix_attention,
    },
    fake=_fake_attention,
    unsupported=launch.unsupported,
)
merge_states = declare(
    "merge_attention_states(Tensor[] outs, Tensor[] lses, Tensor? sinks) -> (Tensor, Tensor)",
    implementations={"reference": reference.merge_states, "triton": launch.merge_states},
    fake=_fake_merge,
    unsupported=lambda outs, *args: launch.unsupported(outs[0]),
)
