"""Differential privacy: norms and clipped sums of privacy units."""

from shared_kernels.ops.dp.api import (
    clip_factors,
    embedding_accumulate,
    gram_error_bound,
    segment_gram_norm,
    segment_mm_clip,
    segment_mm_norm,
    segment_product_sums,
    segment_scaled_mm,
    segment_sums,
    segment_token_gram_norm,
)

__all__ = [
    "clip_factors",
    "embedding_accumulate",
    "gram_error_bound",
    "segment_gram_norm",
    "segment_mm_clip",
    "segment_mm_norm",
    "segment_product_sums",
    "segment_scaled_mm",
    "segment_sums",
    "segment_token_gram_norm",
]
