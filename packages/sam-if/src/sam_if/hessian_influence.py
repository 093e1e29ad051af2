"""Influence in closed form, at weights where training has come to rest.

At a fixed point ``G(w; a) = 0``, so that ``dw / da_i = -C^-1 dG / da_i`` with the Jacobian C of
`SAMField`. Removing sample i takes a_i from 1 to 0: ``dw = C^-1 dG / da_i``, and a query f rises by
``<y, dG / da_i>`` with ``C^T y = grad f``: one linear system a query, and all samples at once. What
is divided by stays n; an average over n - 1 has the same fixed point but for the decay's share.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor

from sam_if.objective import query_gradients
from sam_if.scores import Scores
from sam_if.solvers import LinearSystem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sam_if.field import SAMField

#: Of stationarity, above which weights are at no fixed point.
RESTLESS = 0.05


def warnings_of_rest(stationarity: float) -> list[str]:
    """Return what there is to say of weights that are so far from a fixed point."""
    if stationarity <= RESTLESS:
        return []
    return [
        f"the weights are at no fixed point: stationarity is {stationarity:.2g}, over "
        f"{RESTLESS}; train on, or do not trust a closed form"
    ]


def checked_samples(samples: Iterable[int], count: int) -> list[int]:
    """Return numbers of training samples.

    Raises:
        ValueError: One that is none, or one that is there twice.
    """
    numbers = [int(n) for n in samples]
    if len(set(numbers)) != len(numbers) or not all(0 <= n < count for n in numbers):
        remedy = "numbers of the training data"
        raise ValueError(message("samples", f"different ones below {count}", numbers, remedy))
    return numbers


class HessianInfluence:
    """Scores of training samples by a field at a fixed point.

    Args:
        field: At the trained weights, of the training data.
        solver: ``dense`` makes the ``(p, p)`` matrix once and factorises it; ``gmres`` and
            ``bicgstab`` take products alone; ``ekfac`` is an approximation of linear layers and
            convolutions, see `EKFAC`; ``auto`` is dense up to 2048 parameters, and gmres.
        damping: Added to the Jacobian's diagonal, beside the weight decay.
        tolerance: Of a residual, relative to the right-hand side, for the iterative solvers.
        max_iterations: Of theirs.

    Attributes:
        field: As given.
        system: That is solved for each query, by the solver that was chosen.
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
        self.field = field
        self.system = LinearSystem(
            field, solver, damping=damping, tolerance=tolerance, max_iterations=max_iterations
        )
        self.stationarity = field.stationarity()

    @property
    def warnings(self) -> list[str]:
        """What speaks against the closed form here."""
        return warnings_of_rest(self.stationarity)

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
        solved = [self.system.solve(gradient, transposed=True) for gradient in asked]
        residuals = [residual for _, residual in solved]
        told = self.warnings + self.system.warnings(residuals)
        for text in told:
            warnings.warn(text, stacklevel=2)
        values = torch.stack([self.field.source_dots(y) for y, _ in solved])
        return Scores(values, f"hessian, {self.field.mode}, {self.system.solver}", residuals, told)

    def removal(self, samples: Iterable[int]) -> Tensor:
        """Return the change of the weights if samples were removed, to first order, ``(p,)``.

        Args:
            samples: Their numbers, in the order of the training data.

        Raises:
            ValueError: A number that is none, or one that is there twice.
        """
        numbers = checked_samples(samples, self.field.count)
        chosen = self.field.weights.new_zeros(self.field.count)
        chosen[numbers] = 1
        return self.system.solve(self.field.source(chosen))[0]

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
