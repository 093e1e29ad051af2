"""What the tests of all packages use: tolerances, poisoned memory, the checklist for ops."""

from shared_kernels.testing.checks import check_op
from shared_kernels.testing.poison import poisoned_empty
from shared_kernels.testing.tolerances import (
    EXACT,
    SUM_TOLERANCES,
    TOLERANCES,
    SumTolerance,
    Tolerance,
    assert_same_bits,
    assert_sum_within,
    assert_within,
    ulp_distance,
)

__all__ = [
    "EXACT",
    "SUM_TOLERANCES",
    "TOLERANCES",
    "SumTolerance",
    "Tolerance",
    "assert_same_bits",
    "assert_sum_within",
    "assert_within",
    "check_op",
    "poisoned_empty",
    "ulp_distance",
]
