"""Linear systems of a field's Jacobian, which is not symmetric."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor

from sam_if.ekfac import EKFAC
from sam_if.errors import ConvergenceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sam_if.field import SAMField

SOLVERS = ("auto", "dense", "gmres", "bicgstab", "ekfac")
#: Parameters up to which `auto` makes the matrix.
_DENSE = 2048
_CYCLES = 20


def warnings_of_systems(residuals: Iterable[float], tolerance: float) -> list[str]:
    """Return what there is to say of linear systems that were left with these residuals."""
    worst = max(residuals, default=0.0)
    if worst <= 10 * tolerance:
        return []
    return [
        f"a linear system was left with a residual of {worst:.2g}, over the tolerance of "
        f"{tolerance:.2g}; give damping, or more max_iterations"
    ]


class LinearSystem:
    """``(C + damping) x = b`` with the Jacobian C of a field, or with its transpose.

    Args:
        field: Whose Jacobian it is.
        solver: ``dense`` makes the ``(p, p)`` matrix once and factorises it; ``gmres`` and
            ``bicgstab`` take products alone; ``ekfac`` is an approximation, see `EKFAC`; ``auto``
            is dense up to 2048 parameters, and gmres.
        damping: Added to the Jacobian's diagonal, beside the weight decay.
        tolerance: Of a residual, relative to the right-hand side, for the iterative solvers.
        max_iterations: Of theirs.

    Attributes:
        solver: The one that is used.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        field: SAMField,
        solver: str = "auto",
        *,
        damping: float = 0.0,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ) -> None:
        check_choice("solver", solver, SOLVERS)
        for name, value in (("damping", damping), ("tolerance", tolerance)):
            if not 0 <= value < math.inf:
                raise ValueError(message(name, "a number of at least 0", value, "0 is without"))
        if solver == "auto":
            solver = "dense" if len(field) <= _DENSE else "gmres"
        self.solver = solver
        self._field, self._damping = field, damping
        self._tolerance, self._max_iterations = tolerance, max_iterations
        self._factors: Any = None
        self._near = EKFAC(field, damping=damping) if solver == "ekfac" else None

    def solve(self, b: Tensor, *, transposed: bool = False) -> tuple[Tensor, float]:
        """Return the solution of a system, ``(p,)``, and its relative residual.

        Args:
            b: ``(p,)``.
            transposed: Take the transpose of C.

        Raises:
            ConvergenceError: It is singular, or was not solved.
        """
        if self._near is not None:
            # how far that is from the field's own system is no sign of how good it is
            return self._near.solve(b, transposed=transposed), 0.0
        x = self._dense(b, transposed) if self.solver == "dense" else self._iterative(b, transposed)
        product = self._field.rmatvec(x) if transposed else self._field.matvec(x)
        norm = torch.linalg.vector_norm(b)
        apart = torch.linalg.vector_norm(product + self._damping * x - b)
        residual = float(apart / norm) if norm > 0 else float(apart)
        if not residual <= max(10 * self._tolerance, 1e-3):
            raise ConvergenceError(
                f"solver: {self.solver} left a residual of {residual:.2g}, asked for "
                f"{self._tolerance:.2g}; give damping, or more max_iterations"
            )
        return x, residual

    def warnings(self, residuals: Iterable[float]) -> list[str]:
        """Return what there is to say of systems that were left with these residuals."""
        return warnings_of_systems(residuals, self._tolerance)

    def _dense(self, b: Tensor, transposed: bool) -> Tensor:
        if self._factors is None:
            matrix = self._field.dense()
            matrix.diagonal().add_(self._damping)
            # of a singular matrix, too: the residual tells
            self._factors = torch.linalg.lu_factor_ex(matrix)[:2]
        # of a transposed system, the factors of the matrix itself serve: x A = b
        return torch.linalg.lu_solve(*self._factors, b[:, None], adjoint=transposed)[:, 0]

    def _iterative(self, b: Tensor, transposed: bool) -> Tensor:
        from scipy.sparse import identity, linalg

        operator: Any = self._field.to_scipy()
        operator = operator.T if transposed else operator
        size = len(self._field)
        eye: Any = linalg.aslinearoperator(self._damping * identity(size, format="csr"))
        right = b.double().cpu().numpy()
        options: dict[str, Any] = {"rtol": self._tolerance, "maxiter": self._max_iterations}
        if self.solver == "gmres":
            options |= {
                "restart": min(size, _CYCLES),
                "maxiter": -(-self._max_iterations // _CYCLES),
            }
        found, _ = getattr(linalg, self.solver)(operator + eye, right, **options)
        return torch.from_numpy(found).to(b)
