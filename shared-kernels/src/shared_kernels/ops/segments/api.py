"""Public functions: float64 sums of rows, of segments of rows, and of what experts gave tokens.

Sums are float64 whatever the dtype of the rows, because they are made to be added up over batches;
what is summed, an absolute value, a square or a norm, is float32 (float64 for float64). On a GPU
rows are summed in chunks, and the chunks of a segment are added in a fixed order: equal calls give
equal bits. ``counts`` stay on the device and nothing waits for them: there it is the caller's
promise that they add up to the rows (if they do not, what comes out is not defined, but nothing
outside of the tensors is read); on the CPU that is checked. Rows may have any strides, and are not
copied on a GPU. Tensors must lie outside autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, check_tensor
from shared_kernels.ops.segments import op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KINDS = ("sum", "abs", "square")
#: Columns of `AssignmentSums.columns`.
COLUMNS = ("count", "weight", "share", "norm", "weighted_norm", "norm_max")


def _check_keep(keep: Tensor | None, rows: int, device: torch.device) -> None:
    if keep is not None:
        check_tensor("keep", keep, dtypes=(torch.bool,), shape=(rows,), device=device)


def segment_sums(
    x: Tensor,
    counts: Tensor | None = None,
    *,
    kind: str = "sum",
    keep: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum consecutive rows: each row of x is read once, ``S W`` numbers, in two launches.

    Args:
        x: float ``(S, W)``.
        counts: int64 ``(E,)``, rows of each segment, perhaps 0; they add up to S. None makes all
            rows one segment.
        kind: ``sum`` of x, ``abs`` of |x| or ``square`` of x².
        keep: bool ``(S,)``, rows that count; the others are not read on a GPU and may hold
            anything.
        out: float64 ``(E, W)``, added to and returned.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        float64 ``(E, W)``; 0 for a segment without rows.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, counts that do not add up to the
            rows (on the CPU), an unknown kind, or a tensor of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_choice("kind", kind, _KINDS)
    check_tensor("x", x, dtypes=_DTYPES, shape=(None, None), strided=True)
    (rows, width), device = x.shape, x.device
    segments = 1
    if counts is not None:
        check_tensor("counts", counts, dtypes=(torch.int64,), shape=(None,), device=device)
        segments = len(counts)
    _check_keep(keep, rows, device)
    if out is None:
        out = x.new_zeros(segments, width, dtype=torch.float64)
    check_tensor("out", out, dtypes=(torch.float64,), shape=(segments, width), device=device)
    op.segment_sums_(x, counts, keep, out, kind, impl)
    return out


def norm_sums(
    x: Tensor,
    y: Tensor,
    *,
    keep: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum x² and |y| over all rows, of what enters and what leaves a norm, in two launches.

    Args:
        x: float ``(S, W)``.
        y: float ``(S, W)``, perhaps of another dtype.
        keep: bool ``(S,)``, rows that count; the others are not read on a GPU.
        out: Two of float64 ``(W,)``, added to and returned.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``sum x^2`` and ``sum |y|``, float64 ``(W,)``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, or a tensor of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("x", x, dtypes=_DTYPES, shape=(None, None), strided=True)
    (rows, width), device = x.shape, x.device
    check_tensor("y", y, dtypes=_DTYPES, shape=(rows, width), device=device, strided=True)
    _check_keep(keep, rows, device)
    if out is None:
        square, absolute = x.new_zeros(2, width, dtype=torch.float64)
    else:
        square, absolute = out
    for part in (square, absolute):
        check_tensor("out", part, dtypes=(torch.float64,), shape=(width,), device=device)
    op.norm_sums_(x, y, keep, square, absolute, impl)
    return square, absolute


class AssignmentSums(NamedTuple):
    """Sums over the tokens of each of E experts.

    Attributes:
        output: float64 ``(E, H)``, sums of outputs.
        columns: float64 ``(E, 6)``: tokens, sums of weights, shares, norms and weights times
            norms, and the largest norm, as `COLUMNS` names them.
    """

    output: Tensor
    columns: Tensor

    @classmethod
    def empty(
        cls, experts: int, width: int, *, device: torch.device | str = "cpu"
    ) -> AssignmentSums:
        """Return sums of nothing."""
        return cls(
            torch.zeros(experts, width, dtype=torch.float64, device=device),
            torch.zeros(experts, len(COLUMNS), dtype=torch.float64, device=device),
        )

    def column(self, name: str) -> Tensor:
        """A view ``(E,)`` of a column."""
        return self.columns[:, COLUMNS.index(name)]


def assignment_sums(
    output: Tensor,
    weight: Tensor,
    share: Tensor,
    counts: Tensor,
    *,
    keep: Tensor | None = None,
    out: AssignmentSums | None = None,
    impl: str = "auto",
) -> AssignmentSums:
    """Sum experts' outputs and their norms: each output is read once, in two launches.

    Rows are assignments of a token to an expert, sorted by expert. On a GPU a row is held by one
    program, so that more than 8192 columns are left to the reference there.

    Args:
        output: float ``(S, H)``, what the expert gave the token.
        weight: float ``(S,)``.
        share: float ``(S,)``.
        counts: int64 ``(E,)``, assignments of each expert, perhaps 0; they add up to S.
        keep: bool ``(S,)``, assignments that count; outputs of the others are not read on a GPU.
        out: Sums that are added to and returned; of norms the larger one stays.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, counts that do not add up to the
            rows (on the CPU), or a tensor of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("output", output, dtypes=_DTYPES, shape=(None, None), strided=True)
    (rows, width), device = output.shape, output.device
    check_tensor("weight", weight, dtypes=_DTYPES, shape=(rows,), device=device)
    check_tensor("share", share, dtypes=_DTYPES, shape=(rows,), device=device)
    check_tensor("counts", counts, dtypes=(torch.int64,), shape=(None,), device=device)
    _check_keep(keep, rows, device)
    experts, f64 = len(counts), (torch.float64,)
    if out is None:
        out = AssignmentSums.empty(experts, width, device=device)
    check_tensor("out.output", out.output, dtypes=f64, shape=(experts, width), device=device)
    check_tensor(
        "out.columns", out.columns, dtypes=f64, shape=(experts, len(COLUMNS)), device=device
    )
    op.assignment_sums_(output, weight, share, counts, keep, *out, impl)
    return out
