"""What must be known of a transformers model from outside."""

from shared_kernels.models.attention import attention_of, configs_of, register_attention
from shared_kernels.models.head import Head

__all__ = ["Head", "attention_of", "configs_of", "register_attention"]
