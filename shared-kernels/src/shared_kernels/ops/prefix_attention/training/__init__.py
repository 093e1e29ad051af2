"""Attention of prompts and their continuations, packed, with gradients for both."""

from shared_kernels.ops.prefix_attention.training.api import packed_prefix_attention
from shared_kernels.ops.prefix_attention.training.layout import PackedPrompts

__all__ = ["PackedPrompts", "packed_prefix_attention"]
