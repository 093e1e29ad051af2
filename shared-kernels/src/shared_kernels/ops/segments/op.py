"""Registration of the segment ops."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shared_kernels._checks import message
from shared_kernels._library import declare
from shared_kernels.ops.segments import launch, reference


def _check_counts(rows: Tensor, counts: Tensor | None) -> None:
    """Look at counts where that is no wait for a device, and where no compiler traces it."""
    if counts is None or counts.is_cuda:
        return
    low, total = int(counts.amin()) if len(counts) else 0, int(counts.sum())
    if low < 0 or total != len(rows):
        expected = f"row counts that add up to {len(rows)}"
        got = f"a sum of {total}" if low >= 0 else low
        raise ValueError(message("counts", expected, got, "count each segment's rows"))


def _checked(run: Callable[..., None], at: int) -> Callable[..., None]:
    """Run after a look at the counts, the argument at ``at``."""

    def checked(*args: Any) -> None:
        _check_counts(args[0], args[at])
        run(*args)

    return checked


segment_sums_ = declare(
    "segment_row_sums_(Tensor x, Tensor? counts, Tensor? keep, Tensor(a!) out, str kind) -> ()",
    implementations={
        "reference": _checked(reference.segment_sums_, 1),
        "triton": _checked(launch.segment_sums_, 1),
    },
    fake=lambda *args: None,
    unsupported=launch.unsupported,
)

norm_sums_ = declare(
    "norm_sums_(Tensor x, Tensor y, Tensor? keep, Tensor(a!) square, Tensor(b!) absolute) -> ()",
    implementations={"reference": reference.norm_sums_, "triton": launch.norm_sums_},
    fake=lambda *args: None,
    unsupported=launch.unsupported,
)

assignment_sums_ = declare(
    "assignment_sums_(Tensor output, Tensor weight, Tensor share, Tensor counts, Tensor? keep,"
    " Tensor(a!) output_sum, Tensor(b!) columns) -> ()",
    implementations={
        "reference": _checked(reference.assignment_sums_, 3),
        "triton": _checked(launch.assignment_sums_, 3),
    },
    fake=lambda *args: None,
    unsupported=launch.assignments_unsupported,
)
