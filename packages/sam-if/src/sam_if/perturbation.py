"""SAM's perturbation of weights, and what it does to small changes and to their adjoints.

``eps = rho T^2 g / (N + c)`` with ``T = 1`` (SAM, arXiv:2010.01412) or ``T = diag |w|`` (ASAM,
arXiv:2102.11600), ``N = |T g|``, and a small c that every implementation has in its denominator.
With ``u = T g / N`` and ``P = 1 - N / (N + c) u u^T``:

    d eps = rho / (N + c) T P d(T g) + rho dT u N / (N + c)

which for SAM is ``s P dg`` with ``s = rho / (N + c)``. The rank of that map is that of P, and eps
moves with the direction of g alone: a loss that is scaled has the same eps, but for c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Perturbation:
    """Of one weight vector by one gradient; vectors are ``(p,)``.

    Where the gradient is 0 there is no perturbation, and none of its changes is known: they are
    taken for 0.

    Attributes:
        weights: w; needed by ASAM alone.
        gradient: g.
        rho: Radius of the neighbourhood.
        adaptive: ASAM instead of SAM.
        norm_eps: c.
    """

    weights: Tensor
    gradient: Tensor
    rho: float
    adaptive: bool = False
    norm_eps: float = 1e-12

    def _scaled(self, x: Tensor) -> Tensor:
        """``T x``."""
        return self.weights.abs() * x if self.adaptive else x

    @property
    def norm(self) -> Tensor:
        """``N``, 0-dimensional."""
        return torch.linalg.vector_norm(self._scaled(self.gradient))

    @property
    def scale(self) -> Tensor:
        """``s = rho / (N + c)``, 0-dimensional; 0 where there is no gradient."""
        norm = self.norm
        return torch.where(norm > 0, self.rho / (norm + self.norm_eps), 0.0)

    @property
    def direction(self) -> Tensor:
        """``u = T g / N``; 0 where there is no gradient."""
        scaled = self._scaled(self.gradient)
        norm = self.norm
        return torch.where(norm > 0, scaled / norm, 0.0)

    @property
    def epsilon(self) -> Tensor:
        """The perturbation."""
        return self.scale * self._scaled(self._scaled(self.gradient))

    def project(self, x: Tensor) -> Tensor:
        """``P x``, of ``(p,)`` or ``(Q, p)``."""
        norm, u = self.norm, self.direction
        return x - norm / (norm + self.norm_eps) * (x @ u).unsqueeze(-1) * u

    def tangent(self, change: Tensor, moved: Tensor | None = None) -> Tensor:
        """Return how the perturbation changes with the gradient and with the weights themselves.

        Args:
            change: Of the gradient.
            moved: Of the weights, by which ASAM measures; None is 0.
        """
        if not self.adaptive:
            return self.scale * self.project(change)
        inner = self._scaled(change)
        if moved is None:
            return self.scale * self._scaled(self.project(inner))
        signs = self.weights.sign() * moved
        shrunk = self.scale * self._scaled(self.gradient)
        inner = inner + signs * self.gradient
        return signs * shrunk + self.scale * self._scaled(self.project(inner))

    def adjoint(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the adjoints of the gradient and of the weights by that of the perturbation.

        The second is None for SAM, which measures without the weights. Several adjoints are
        ``(Q, p)``.
        """
        if not self.adaptive:
            return self.scale * self.project(y), None
        inner = self.scale * self.project(self._scaled(y))
        shrunk = self.scale * self._scaled(self.gradient)
        return self._scaled(inner), self.weights.sign() * (shrunk * y + self.gradient * inner)
