"""What a language model's head says of some tokens, without its logits being kept."""

from shared_kernels.ops.lm_head.api import LinearLogprob, linear_logprob

__all__ = ["LinearLogprob", "linear_logprob"]
