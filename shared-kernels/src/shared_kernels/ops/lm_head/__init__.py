"""What a language model's head says of some tokens, without its logits being kept."""

from shared_kernels.ops.lm_head.api import (
    LinearEntropy,
    LinearLogprob,
    linear_entropy,
    linear_logprob,
)

__all__ = ["LinearEntropy", "LinearLogprob", "linear_entropy", "linear_logprob"]
