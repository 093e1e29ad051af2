"""Softmax-weighted means of hidden states, at once, in pieces, and one token at a time."""

from shared_kernels.ops.pool.api import PoolState, StepHead, plp_step, segment_softmax_pool

__all__ = ["PoolState", "StepHead", "plp_step", "segment_softmax_pool"]
