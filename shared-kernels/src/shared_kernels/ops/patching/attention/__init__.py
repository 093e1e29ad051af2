"""Attention of many changed runs, as the difference from the base run's."""

from shared_kernels.ops.patching.attention.api import suffix_attention

__all__ = ["suffix_attention"]
