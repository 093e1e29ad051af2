"""What must be known of a transformers model from outside."""

from shared_kernels.models.head import Head

__all__ = ["Head"]
