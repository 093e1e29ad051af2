"""Differential privacy: clipped sums of privacy units, and the noise step."""

from shared_kernels.ops.dp.api import (
    certified_norm,
    clip_factors,
    embedding_accumulate,
    gram_error_bound,
    segment_gram_clip,
    segment_gram_norm,
    segment_mm_clip,
    segment_mm_norm,
    segment_product_sums,
    segment_scaled_mm,
    segment_sums,
    segment_token_gram_norm,
)
from shared_kernels.ops.dp.noise import gaussian_step, gaussian_steps

__all__ = [
    "certified_norm",
    "clip_factors",
    "embedding_accumulate",
    "gaussian_step",
    "gaussian_steps",
    "gram_error_bound",
    "segment_gram_clip",
    "segment_gram_norm",
    "segment_mm_clip",
    "segment_mm_norm",
    "segment_product_sums",
    "segment_scaled_mm",
    "segment_sums",
    "segment_token_gram_norm",
]
