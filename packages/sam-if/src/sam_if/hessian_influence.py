"""Influence in closed form, at weights where training has come to rest.

At a fixed point ``G(w; a) = 0``, so that ``dw / da_i = -C^-1 dG / da_i`` with the Jacobian C of
`SAMField`. Removing sample i takes a_i from 1 to 0: ``dw = C^-1 dG / da_i``, and a query f rises by
``<y, dG / da_i>`` with ``C^T y = grad f``: one linear system a query, and all samples at once. What
is divided by stays n; an average over n - 1 has the same fixed point but for the decay's share.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor

from sam_if.errors import ConvergenceError
from sam_if.objective import query_gradients
from sam_if.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sam_if.field import SAMField

SOLVERS = ("auto", "dense", "gmres", "bicgstab")
#: Parameters up to which `auto` makes the matrix.
_DENSE = 2048
#: Of stationarity, above which weights are at no fixed point.
_RESTLESS = 0.05
_CYCLES = 20


class HessianInfluence:
    """Scores of training samples by a field at a fixed point.

    Args:
        field: At the trained weights, of the training data.
        solver: ``dense`` makes the ``(p, p)`` matrix once and factorises it; ``gmres`` and
            ``bicgstab`` take products alone; ``auto`` is dense up to 2048 parameters, and gmres.
        damping: Added to the Jacobian's diagonal, beside the weight decay.
        tolerance: Of a residual, relative to the right-hand side, for the iterative solvers.
        max_iterations: Of theirs.

    Attributes:
        stationarity: Of the field: how far from a fixed point, see `SAMField.stationarity`.

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
        self.field, self.solver, self.damping = field, solver, damping
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.stationarity = field.stationarity()
        self._factors: Any = None

    @property
    def warnings(self) -> list[str]:
        """What speaks against the closed form here."""
        if self.stationarity <= _RESTLESS:
            return []
        return [
            f"the weights are at no fixed point: stationarity is {self.stationarity:.2g}, over "
            f"{_RESTLESS}; train on, or do not trust a closed form"
        ]

    def scores(self, queries: Iterable[Any], *, mean: bool = False) -> Scores:
        """Return by how much removing each training sample would raise what is asked.

        Args:
            queries: Batches, as the field's objective measures them.
            mean: Ask for the mean over all of them, for one linear system.

        Raises:
            ConvergenceError: A linear system is singular, or was not solved.
            ValueError: No queries.
        """
        asked = query_gradients(self.field.vector, self.field.weights, queries, mean)
        solved = [self._solve(gradient, transposed=True) for gradient in asked]
        residuals = [residual for _, residual in solved]
        told = self.warnings
        if max(residuals) > 10 * self.tolerance:
            told.append(
                f"a linear system was left with a residual of {max(residuals):.2g}, over the "
                f"tolerance of {self.tolerance:.2g}; give damping, or more max_iterations"
            )
        for text in told:
            warnings.warn(text, stacklevel=2)
        values = torch.stack([self.field.source_dots(y) for y, _ in solved])
        return Scores(values, f"hessian, {self.field.mode}, {self.solver}", residuals, told)

    def removal(self, samples: Iterable[int]) -> Tensor:
        """Return the change of the weights if samples were removed, to first order, ``(p,)``.

        Args:
            samples: Their numbers, in the order of the training data.

        Raises:
            ValueError: A number that is none, or one that is there twice.
        """
        numbers = list(samples)
        count = self.field.count
        if len(set(numbers)) != len(numbers) or not all(0 <= n < count for n in numbers):
            remedy = "numbers of the training data"
            raise ValueError(message("samples", f"different ones below {count}", numbers, remedy))
        chosen = self.field.weights.new_zeros(count)
        chosen[numbers] = 1
        return self._solve(self.field.source(chosen), transposed=False)[0]

    def self_influence(self, samples: Iterable[int] | None = None) -> Tensor:
        """Return by how much each sample's own loss would rise without it, ``(m,)``.

        Args:
            samples: Numbers; by default all, each of which takes a linear system.
        """
        field = self.field
        chosen = range(field.count) if samples is None else list(samples)
        found = []
        for number in chosen:
            change = self.removal([number])
            found.append(field.losses_along(number, change))
        return torch.stack(found)

    def _solve(self, b: Tensor, *, transposed: bool) -> tuple[Tensor, float]:
        """Return the solution of a system, and its relative residual."""
        x = self._dense(b, transposed) if self.solver == "dense" else self._iterative(b, transposed)
        product = self.field.rmatvec(x) if transposed else self.field.matvec(x)
        norm = torch.linalg.vector_norm(b)
        apart = torch.linalg.vector_norm(product + self.damping * x - b)
        residual = float(apart / norm) if norm > 0 else float(apart)
        if not residual <= max(10 * self.tolerance, 1e-3):
            raise ConvergenceError(
                f"solver: {self.solver} left a residual of {residual:.2g}, asked for "
                f"{self.tolerance:.2g}; give damping, or more max_iterations"
            )
        return x, residual

    def _dense(self, b: Tensor, transposed: bool) -> Tensor:
        if self._factors is None:
            matrix = self.field.dense()
            matrix.diagonal().add_(self.damping)
            # of a singular matrix, too: the residual tells
            self._factors = torch.linalg.lu_factor_ex(matrix)[:2]
        # of a transposed system, the factors of the matrix itself serve: x A = b
        if transposed:
            return torch.linalg.lu_solve(*self._factors, b[:, None], adjoint=True)[:, 0]
        return torch.linalg.lu_solve(*self._factors, b[:, None])[:, 0]

    def _iterative(self, b: Tensor, transposed: bool) -> Tensor:
        from scipy.sparse import linalg

        operator: Any = self.field.to_scipy()
        operator = operator.T if transposed else operator
        size = len(self.field)
        eye: Any = linalg.aslinearoperator(self.damping * _identity(size))
        right = b.double().cpu().numpy()
        options: dict[str, Any] = {"rtol": self.tolerance, "maxiter": self.max_iterations}
        if self.solver == "gmres":
            options |= {
                "restart": min(size, _CYCLES),
                "maxiter": -(-self.max_iterations // _CYCLES),
            }
        found, _ = getattr(linalg, self.solver)(operator + eye, right, **options)
        return torch.from_numpy(found).to(b)


def _identity(size: int) -> Any:
    from scipy.sparse import identity

    return identity(size, format="csr")
