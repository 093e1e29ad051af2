"""Draw tokens with counter-based noise, and keep the places of a decoding batch full."""

from shared_kernels.ops.sampling.api import (
    SlotState,
    gumbel_noise,
    gumbel_sample,
    logit_threshold,
    slot_refill_,
)

__all__ = ["SlotState", "gumbel_noise", "gumbel_sample", "logit_threshold", "slot_refill_"]
