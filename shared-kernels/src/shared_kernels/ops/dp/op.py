"""Registration of the segment operations."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.dp import launch, reference


def _per_unit(g: Tensor, cu_seqlens: Tensor, *shape: int) -> Tensor:
    """Return an unwritten result with one entry, or row, per unit."""
    dtype = reference.accumulate_dtype(g.dtype)
    return g.new_empty((cu_seqlens.shape[0] - 1, *shape), dtype=dtype)


def _fake_pair(a: Tensor, g: Tensor, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _per_unit(g, cu_seqlens), _per_unit(g, cu_seqlens)


def _fake_norms(a: Tensor, g: Tensor, cu_seqlens: Tensor, *args: Any) -> Tensor:
    return _per_unit(g, cu_seqlens)


def _fake_sums(x: Tensor, g: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    return _per_unit(x, cu_seqlens, x.shape[1])


def _fake_like(n2: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(n2)


def _fake_nothing(*args: Any) -> None:
    return None


gram_norm = declare(
    "segment_gram_norm(Tensor a, Tensor g, Tensor cu_seqlens, bool bias, SymInt? max_seqlen)"
    " -> (Tensor, Tensor)",
    implementations={"reference": reference.gram_norm, "triton": launch.gram_norm},
    fake=_fake_pair,
    unsupported=launch.unsupported,
)
token_gram_norm = declare(
    "segment_token_gram_norm(Tensor tokens, Tensor g, Tensor cu_seqlens, SymInt? padding_idx,"
    " SymInt? max_seqlen) -> (Tensor, Tensor)",
    implementations={"reference": reference.token_gram_norm, "triton": launch.token_gram_norm},
    fake=_fake_pair,
    unsupported=launch.unsupported,
)
mm_norm = declare(
    "segment_mm_norm(Tensor a, Tensor g, Tensor cu_seqlens, bool bias, SymInt row_multiple)"
    " -> Tensor",
    implementations={"reference": reference.mm_norm, "triton": launch.mm_norm},
    fake=_fake_norms,
    unsupported=launch.unsupported,
)
scaled_mm_ = declare(
    "segment_scaled_mm_(Tensor a, Tensor g, Tensor cu_seqlens, Tensor scale, Tensor(a!) out,"
    " Tensor(b!)? bias_out, SymInt row_multiple) -> ()",
    implementations={"reference": reference.scaled_mm, "triton": launch.scaled_mm},
    fake=_fake_nothing,
    unsupported=launch.unsupported,
)
mm_clip_ = declare(
    "segment_mm_clip_(Tensor a, Tensor g, Tensor cu_seqlens, Tensor threshold, Tensor(a!) out,"
    " Tensor(b!)? bias_out, str clipping, float stability, SymInt? chunk, SymInt? max_seqlen,"
    " bool equal, bool accumulate) -> Tensor",
    implementations={"reference": reference.mm_clip, "triton": launch.mm_clip},
    fake=_fake_norms,
    unsupported=launch.unsupported,
)
gram_clip_ = declare(
    "segment_gram_clip_(Tensor a, Tensor g, Tensor cu_seqlens, Tensor threshold, Tensor(a!) out,"
    " Tensor(b!)? bias_out, str clipping, float stability, SymInt? max_seqlen,"
    " SymInt row_multiple) -> Tensor",
    implementations={"reference": reference.gram_clip, "triton": launch.gram_clip},
    fake=_fake_norms,
    unsupported=launch.unsupported,
)
sums = declare(
    "segment_sums(Tensor x, Tensor? g, Tensor cu_seqlens) -> Tensor",
    implementations={"reference": reference.sums, "triton": launch.sums},
    fake=_fake_sums,
    unsupported=launch.unsupported,
)
embedding_accumulate_ = declare(
    "embedding_accumulate_(Tensor tokens, Tensor g, Tensor cu_seqlens, Tensor scale,"
    " Tensor(a!) out, SymInt? padding_idx) -> ()",
    implementations={
        "reference": reference.embedding_accumulate,
        "triton": launch.embedding_accumulate,
    },
    fake=_fake_nothing,
    unsupported=launch.unsupported,
)
clip_factors = declare(
    "clip_factors(Tensor n2, Tensor threshold, str clipping, float stability) -> Tensor",
    implementations={"reference": reference.clip_factors, "triton": launch.clip_factors},
    fake=_fake_like,
    unsupported=launch.unsupported,
)
certified_norm = declare(
    "certified_norm(Tensor n2, Tensor absolute, Tensor cu_seqlens, SymInt features, SymInt outputs)"
    " -> Tensor",
    implementations={"reference": reference.certified_norm, "triton": launch.certified_norm},
    fake=_fake_like,
    unsupported=launch.unsupported,
)
