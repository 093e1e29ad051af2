"""Attention of one newest token per slot: over a prefix held once, and over the slot's own keys."""

from shared_kernels.ops.prefix_attention.decode.api import decode_attention, decode_tile

__all__ = ["decode_attention", "decode_tile"]
