"""The loss of some batches, its gradients, and what each sample has to do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import grad, jvp

from sam_if.errors import DerivativeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sam_if.objective import ParameterVector


#: How far a product with a Hessian may be from differences of gradients, by dtype.
_FAR = {torch.float64: 1e-4, torch.float32: 0.05}


class BatchLoss:
    """``L(w) = sum_i a_i l_i(w) / count`` over batches that one perturbation is of.

    Args:
        vector: Of the model's parameters.
        batches: Each with the places of its samples among all, and what its sum is divided by.
        sample_weights: a, of all samples.
    """

    def __init__(
        self,
        vector: ParameterVector,
        batches: Sequence[tuple[Any, slice, float]],
        sample_weights: Tensor,
    ) -> None:
        self.vector, self.batches = vector, batches
        self.sample_weights = sample_weights

    def loss(self, at: Tensor, weights: Tensor) -> Tensor:
        """Return ``L``, 0-dimensional, of all batches in one graph."""
        losses = [
            weights[place] @ self.vector.losses(at, batch) / count
            for batch, place, count in self.batches
        ]
        return torch.stack(losses).sum()

    def _summed(
        self,
        function: Callable[[Callable[[Tensor], Tensor]], Tensor],
        weights: Tensor | None = None,
    ) -> Tensor:
        """Add a linear function of the loss up, batch by batch."""
        total = None
        given = self.sample_weights if weights is None else weights
        for batch, place, count in self.batches:

            def part(
                at: Tensor, batch: Any = batch, place: slice = place, count: float = count
            ) -> Tensor:
                return given[place] @ self.vector.losses(at, batch) / count

            found = function(part)
            total = found if total is None else total + found
        assert total is not None
        return total

    def gradient(self, at: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return ``grad L``, ``(p,)``, with these weights of samples or others."""
        return self._summed(lambda loss: grad(loss)(at), weights)

    def hessian(self, at: Tensor, x: Tensor) -> Tensor:
        """Return ``H x``, ``(p,)``."""
        return self._summed(lambda loss: jvp(grad(loss), (at,), (x,))[1])

    def directional(self, at: Tensor, x: Tensor) -> Tensor:
        """Return ``<grad l_i, x> / count`` of each sample."""
        found = []
        for batch, _, count in self.batches:
            losses = lambda w, batch=batch: self.vector.losses(w, batch)  # noqa: E731
            found.append(jvp(losses, (at,), (x,))[1] / count)
        return torch.cat(found)

    def both(self, at: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``H x`` and ``<grad l_i, x> / count``, the second for nothing.

        The losses of samples come along with the gradient whose derivative is taken. That is
        forwards over backwards: backwards over forwards, torch takes what a layer norm has saved
        for constants, and is wrong (pytorch issue 196700).
        """
        total, dots = torch.zeros_like(at), []
        for batch, place, count in self.batches:

            def part(
                w: Tensor, batch: Any = batch, place: slice = place, count: float = count
            ) -> tuple[Tensor, Tensor]:
                found = self.vector.losses(w, batch) / count
                return self.sample_weights[place] @ found, found

            product, along = jvp(grad(part, has_aux=True), (at,), (x,))[1]
            total = total + product
            dots.append(along)
        return total, torch.cat(dots)

    def derivative_error(self, at: Tensor, seed: int = 0) -> float:
        """Return how far ``H x`` is from a difference of gradients, for a random x.

        Not every rule that torch has for a derivative is right in every order, and a kernel may
        have none: what is wrong is so by much, where rounding is by little.

        Raises:
            DerivativeError: It is far.
        """
        draws = torch.Generator(at.device).manual_seed(seed)
        x = torch.randn(at.shape, generator=draws, dtype=at.dtype, device=at.device)
        size = torch.linalg.vector_norm(at).clamp(min=1) / torch.linalg.vector_norm(x)
        x = x * size * torch.finfo(at.dtype).eps ** (1 / 3)
        product, _ = self.both(at, x)
        wanted = (self.gradient(at + x) - self.gradient(at - x)) / 2
        norm = torch.linalg.vector_norm
        far = float(norm(product - wanted) / norm(wanted).clamp(min=torch.finfo(at.dtype).tiny))
        if not far <= _FAR[at.dtype]:
            raise DerivativeError(
                f"second derivatives are {far:.2g} from differences of gradients, as a part of "
                "them; an operation of the model has no right rule for them: take a plain "
                "implementation (attn_implementation='eager', modules of torch without kernels)"
            )
        return far
