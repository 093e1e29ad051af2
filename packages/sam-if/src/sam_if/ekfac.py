"""The inverse of SAM's Jacobian by Kronecker factors with corrected eigenvalues (EKFAC).

The curvature of a linear layer is about ``A (x) S`` with the second moments A of its inputs and S
of the gradients of its outputs (K-FAC, arXiv:1503.05671). In the basis of their eigenvectors its
diagonal is measured (EKFAC, arXiv:1806.03884), here twice in the same basis: L at the weights, and
L~ at the moved ones, where A and S are from. With Q the basis, ``a = H~ u`` and ``b = H u``

    H~ (1 + s P H) + lambda  ~  D - s a b^T,   D = Q diag(L~ (1 + s L) + lambda) Q^T

whose inverse is known (Sherman and Morrison). The direction u of the gradient is of all layers
together, so that what it adds couples them. It is exact where both Hessians have that basis.

Curvature is the generalised Gauss-Newton matrix, of which gradients with drawn labels have the
second moment; it is at least 0, unlike Hessians of networks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.ops.ghost import kron_cov_
from torch import Tensor

from sam_if.layers import capture, layers_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam_if.field import SAMField

#: Bytes of per-sample gradients that exist at a time.
_AT_A_TIME = 64 << 20
#: Of the denominator of the rank-one term, below which it is left out.
_SINGULAR = 1e-6


class EKFAC:
    """An approximate inverse of a field's Jacobian.

    With one perturbation for each batch, s is their mean and the rank-one term, of another
    direction for each, is left out. Parameters of no linear layer or convolution have a diagonal.

    Args:
        field: In mode ``field`` or ``frozen``, of SAM; its objective has ``pseudo``, as those that
            are ready-made.
        damping: Added to the diagonal, beside the weight decay.
        draws: Of labels for each sample.
        seed: Of theirs.

    Attributes:
        basis: Of each layer, eigenvectors ``(o, o)`` and ``(i, i)``.
        moved: L~ of each layer, ``(o, i)``, and of other parameters, ``(r,)``.
        still: L of the same.

    Raises:
        ValueError: Another mode, ASAM, or an objective without ``pseudo``.
    """

    def __init__(
        self, field: SAMField, *, damping: float = 0.0, draws: int = 1, seed: int = 0
    ) -> None:
        check_range("draws", draws, 1, 1 << 31, "more are nearer to the curvature")
        if field.mode not in ("field", "frozen") or field.adaptive:
            got = "adaptive" if field.adaptive else field.mode
            remedy = "take another solver"
            raise ValueError(message("field", "mode field or frozen, of SAM", got, remedy))
        if not 0 <= damping < math.inf:
            remedy = "0 is without"
            raise ValueError(message("damping", "a number of at least 0", damping, remedy))
        self._field, self._draws, self._seed = field, draws, seed
        self._layers, rest = layers_of(field.vector.model, field.vector)
        self._rest = self._places(rest)
        self.basis = self._basis()
        self.moved = self._values(moved=True)
        self.still = self._values(moved=False) if field.mode == "field" else []
        decay = torch.as_tensor(field.weight_decay, dtype=torch.float64)
        if decay.min() != decay.max():
            remedy = "take another solver, which knows each parameter's"
            raise ValueError(message("field", "one weight decay", "several", remedy))
        self._shift = damping + float(decay.max())
        self._scale = torch.stack([found.scale for found in field.perturbations]).mean()
        self._rank_one: tuple[Tensor, Tensor, Tensor] | None = None
        if field.mode == "field" and len(field.perturbations) == 1:
            found = field.perturbations[0]
            # P u of a gradient that is not 0 is c / (N + c) u, which is next to nothing
            shrunk = found.norm / (found.norm + found.norm_eps)
            a, b = self.curvature(found.direction), self.curvature(found.direction, moved=False)
            self._rank_one = (a, b, self._scale * shrunk)

    def _places(self, names: list[str]) -> Tensor:
        """Return places of parameters in the vector."""
        vector, begin, found = self._field.vector, 0, []
        for name, size in zip(vector.names, vector.sizes, strict=True):
            if name in names:
                found.append(torch.arange(begin, begin + size))
            begin += size
        empty = torch.zeros(0, dtype=torch.long)
        return torch.cat([empty, *found]).to(self._field.weights.device)

    # --- curvature -------------------------------------------------------------------------------

    def _passes(self, moved: bool) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]]:
        """Return what layers see, with drawn labels, of every batch and draw.

        Gradients have the roots of what samples count, which come first, ``(b,)``.
        """
        field = self._field
        draws = torch.Generator(field.weights.device).manual_seed(self._seed)
        for group, epsilon in zip(field.groups, field.epsilons(), strict=True):
            at = field.weights + epsilon if moved else field.weights
            for batch, place, count in group.batches:
                share = field.sample_weights[place] / (count * len(field.groups) * self._draws)
                root = share.clamp(min=0).sqrt()
                for _ in range(self._draws):

                    def drawn(w: Tensor, batch: Any = batch, root: Tensor = root) -> Tensor:
                        return root @ field.vector.pseudo(w, batch, draws)

                    yield root, *capture(self._layers, drawn, at, len(root))

    def _basis(self) -> list[tuple[Tensor, Tensor]]:
        like = self._field.weights
        sizes = [(o, i + (layer.bias is not None))
                 for layer in self._layers for o, i in [layer.shape]]  # fmt: skip
        inner = [like.new_zeros(i, i) for _, i in sizes]
        outer = [like.new_zeros(o, o) for o, _ in sizes]
        for root, seen, _ in self._passes(moved=True):
            for a, s, (x, d) in zip(inner, outer, seen, strict=True):
                kron_cov_(a, s, x * root[:, None, None], d)
        return [
            (torch.linalg.eigh(s)[1], torch.linalg.eigh(a)[1])
            for a, s in zip(inner, outer, strict=True)
        ]

    def _values(self, moved: bool) -> list[Tensor]:
        """Return the diagonal of curvature in the basis, and of other parameters."""
        like = self._field.weights
        found = [like.new_zeros(len(outer), len(inner)) for outer, inner in self.basis]
        rest = like.new_zeros(len(self._rest))
        for _, seen, gradient in self._passes(moved):
            for total, (outer, inner), (x, d) in zip(found, self.basis, seen, strict=True):
                at_a_time = max(1, _AT_A_TIME // (total.nbytes or 1))
                for one, other in zip(
                    (x @ inner).split(at_a_time), (d @ outer).split(at_a_time), strict=True
                ):
                    total += torch.einsum("bti,bto->boi", one, other).square_().sum(0)
            # drawn gradients of samples are independent and have no mean, so that the square of
            # their sum is the sum of their squares on average
            rest += gradient[self._rest].square()
        return [*found, rest]

    def _scaled(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return ``Q diag(scales) Q^T x``, ``(p,)``."""
        found = torch.empty_like(x)
        for layer, (outer, inner), scale in zip(self._layers, self.basis, scales[:-1], strict=True):
            rotated = outer.T @ layer.matrix(x) @ inner
            layer.put(found, outer @ (rotated * scale) @ inner.T)
        found[self._rest] = x[self._rest] * scales[-1]
        return found

    def curvature(self, x: Tensor, *, moved: bool = True) -> Tensor:
        """Return curvature times a vector, ``(p,)``: at the moved weights, or at the weights."""
        return self._scaled(x, self.moved if moved else self.still)

    # --- the inverse -----------------------------------------------------------------------------

    def _divided(self, x: Tensor) -> Tensor:
        """Return ``D^-1 x``."""
        if self.still:
            total = [m * (1 + self._scale * s) for m, s in zip(self.moved, self.still, strict=True)]
        else:
            total = self.moved
        tiny = torch.finfo(x.dtype).tiny
        return self._scaled(x, [1 / (part + self._shift).clamp(min=tiny) for part in total])

    def solve(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """Return the approximate inverse times a vector, ``(p,)``."""
        found = self._divided(x)
        if self._rank_one is None:
            return found
        a, b, scale = self._rank_one
        if transposed:
            a, b = b, a
        pulled = self._divided(a)
        below = 1 - scale * (b @ pulled)
        if below.abs() < _SINGULAR:
            return found
        return found + scale * pulled * (b @ found) / below
