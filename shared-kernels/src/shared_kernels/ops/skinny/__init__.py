"""Few rows times several matrices, in one launch."""

from shared_kernels.ops.skinny.api import MOST_ROWS, skinny_linears

__all__ = ["MOST_ROWS", "skinny_linears"]
