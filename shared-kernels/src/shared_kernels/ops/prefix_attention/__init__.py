"""Attention of many packed rows over keys that are held once."""

from shared_kernels.ops.prefix_attention.api import (
    merge_attention_states,
    shared_prefix_attention,
)
from shared_kernels.ops.prefix_attention.layout import FixedLayout, PrefixLayout

__all__ = ["FixedLayout", "PrefixLayout", "merge_attention_states", "shared_prefix_attention"]
