"""How far laws over a vocabulary are from a base law, from differences of final states."""

from shared_kernels.ops.patching.kl.api import kl_from_delta, mean_weight

__all__ = ["kl_from_delta", "mean_weight"]
