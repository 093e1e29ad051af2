"""Float64 sums of consecutive rows, and of what experts gave the tokens routed to them."""

from shared_kernels.ops.segments.api import (
    COLUMNS,
    AssignmentSums,
    assignment_sums,
    norm_sums,
    segment_sums,
)

__all__ = ["COLUMNS", "AssignmentSums", "assignment_sums", "norm_sums", "segment_sums"]
