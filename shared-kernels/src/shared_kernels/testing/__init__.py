"""What the tests of all packages use: tolerances, poisoned memory, the checklist for ops."""

from shared_kernels.testing.checks import check_op
from shared_kernels.testing.poison import poisoned_empty
from shared_kernels.testing.tolerances import (
    EXACT,
    TOLERANCES,
    Tolerance,
    assert_same_bits,
    assert_within,
    ulp_distance,
)

__all__ = [
    "EXACT",
    "TOLERANCES",
    "Tolerance",
    "assert_same_bits",
    "assert_within",
    "check_op",
    "poisoned_empty",
    "ulp_distance",
]
