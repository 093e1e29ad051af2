"""What SAM follows, its Jacobian, and how it moves with the weights of samples.

With sample weights a, batches B of b samples and ``L_B(w; a) = sum_{i in B} a_i l_i(w) / b``, SAM
follows ``G(w; a) = mean_B grad L_B(w + eps_B(w; a); a) + lambda w``, whose zeros are its fixed
points: not those of the gradient of ``L(w + eps(w))``, and not those of the largest loss nearby.
Let H and H~ be Hessians of the loss at w and at ``w + eps``. The Jacobian of G,
``H~ (1 + s P H) + lambda``, is not symmetric: methods for symmetric systems do not apply.

Four modes say which object is meant; they agree for small rho:

- ``field``: G itself, what optimizers implement.
- ``frozen``: eps does not move, ``H~ + lambda``.
- ``objective``: the gradient of ``F(w) = L(w + eps(w)) + lambda w^2 / 2`` and its Hessian, with the
  third derivatives of the loss.
- ``envelope``: eps is the exact maximiser nearby, where ``grad L(w + eps) = mu eps``; then the
  gradient of the largest loss is that at ``w + eps`` (Danskin).

None of it stands in arXiv:2507.04059 in so many words: they are derived here from its setting, and
held against automatic differentiation in tests.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor
from torch.func import grad, jvp

from sam_if.batches import BatchLoss
from sam_if.errors import ConvergenceError
from sam_if.objective import ParameterVector
from sam_if.perturbation import Perturbation
from sam_if.requirements import check_derivatives

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from scipy.sparse.linalg import LinearOperator
    from torch import nn

    from sam_if.objective import Objective

MODES = ("field", "frozen", "objective", "envelope")
PERTURBATIONS = ("minibatch", "full")
#: Of the exact maximiser: steps, and how far the last may go, as a part of rho.
_STEPS, _NEAR = 10_000, 1e-10


class SAMField:
    """SAM's field at a model's weights, without its matrix.

    Products take two Hessian-vector products for each batch (``objective``: one of F). They need
    models with forward-mode derivatives: ``attn_implementation="eager"`` in transformers.

    Args:
        model: In float32 or float64, in eval mode or without what is random.
        objective: Its losses.
        data: Batches, which are kept: what ``objective`` takes.
        rho: Radius of the neighbourhood.
        weight_decay: lambda, at the weights and outside of the perturbation; ``(p,)`` where
            parameters differ.
        adaptive: ASAM.
        perturbation: ``minibatch``: each batch has its own eps, as where a step sees one batch;
            ``full``: all data have one.
        mode: ``field``, ``frozen``, ``objective`` or ``envelope``; see the module.
        sample_weights: a, ``(n,)`` in the order of the data; 1 by default. What the sums are
            divided by stays.
        norm_eps: c of the perturbation.

    Attributes:
        vector: Trained parameters as one vector.
        weights: w, ``(p,)``.
        groups: Losses of data that have one perturbation.

    Raises:
        ValueError: No data, an option that is out of range, ``envelope`` with ASAM, or a model in
            16 bits or with fused attention.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Iterable[Any],
        rho: float,
        weight_decay: float | Tensor = 0.0,
        *,
        adaptive: bool = False,
        perturbation: str = "minibatch",
        mode: str = "field",
        sample_weights: Tensor | None = None,
        norm_eps: float = 1e-12,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("perturbation", perturbation, PERTURBATIONS)
        for name, value in (("rho", rho), ("weight_decay", weight_decay)):
            given = torch.as_tensor(value)
            if not ((given >= 0) & (given < math.inf)).all():
                raise ValueError(message(name, "a number of at least 0", value, "0 is without"))
        if mode == "envelope" and (adaptive or not rho):
            remedy = "the maximiser nearby is that of SAM with a radius"
            raise ValueError(message("mode", "field, frozen or objective", mode, remedy))
        check_derivatives(model)
        self.vector = ParameterVector(model, objective)
        self.weights = self.vector.read()
        self.rho, self.weight_decay, self.adaptive = rho, weight_decay, adaptive
        self.mode, self.norm_eps = mode, norm_eps
        batches = list(data)
        with torch.no_grad():
            sizes = [len(self.vector.losses(self.weights, batch)) for batch in batches]
        if not sum(sizes):
            raise ValueError(message("data", "at least one sample", 0, "give batches"))
        ends = [0, *accumulate(sizes)]
        places = [slice(low, high) for low, high in pairwise(ends)]
        self.count = ends[-1]
        if sample_weights is None:
            sample_weights = self.weights.new_ones(self.count)
        if sample_weights.shape != (self.count,):
            remedy = "one for each sample of the data"
            got = tuple(sample_weights.shape)
            raise ValueError(message("sample_weights", f"({self.count},)", got, remedy))
        self.sample_weights = sample_weights.to(self.weights)
        whole = perturbation == "full"
        parts = [
            (batch, place, self.count if whole else size)
            for batch, place, size in zip(batches, places, sizes, strict=True)
        ]
        self.groups = [
            BatchLoss(self.vector, group, self.sample_weights)
            for group in ([parts] if whole else [[part] for part in parts])
        ]
        self._perturbations: list[Perturbation] | None = None
        self._maximisers: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.weights)

    # --- where it is -----------------------------------------------------------------------------

    @property
    def perturbations(self) -> list[Perturbation]:
        """Of each batch, or of all data; kept, as each is ``(p,)``."""
        if self._perturbations is None:
            self._perturbations = [
                Perturbation(
                    self.weights, group.gradient(self.weights), self.rho, self.adaptive,
                    self.norm_eps,
                )
                for group in self.groups
            ]  # fmt: skip
        return self._perturbations

    def epsilons(self) -> list[Tensor]:
        """Return eps of each batch, ``(p,)``: in ``envelope`` the exact maximiser.

        Raises:
            ConvergenceError: There is no maximiser that gradients lead to.
        """
        if self.mode != "envelope":
            return [found.epsilon for found in self.perturbations]
        if self._maximisers is None:
            self._maximisers = [
                self._maximiser(group, found.epsilon)
                for group, found in zip(self.groups, self.perturbations, strict=True)
            ]
        return self._maximisers

    def _maximiser(self, group: BatchLoss, epsilon: Tensor) -> Tensor:
        """Return where the gradient is along the perturbation, from the first step of SAM on."""
        for _ in range(_STEPS):
            found = group.gradient(self.weights + epsilon)
            norm = torch.linalg.vector_norm(found)
            after = self.rho * found / norm
            apart = torch.linalg.vector_norm(after - epsilon)
            epsilon = after
            if apart <= _NEAR * self.rho:
                return epsilon
        raise ConvergenceError(
            f"mode: no largest loss within rho={self.rho} was found in {_STEPS} steps, the last "
            f"moved by {float(apart):.2g}; take a smaller rho, or mode='field'"
        )

    def residual(self) -> Tensor:
        """Return G at the weights, ``(p,)``; 0 at a fixed point."""
        if self.mode == "objective":
            parts = [grad(self._worst(group))(self.weights) for group in self.groups]
        else:
            parts = [
                group.gradient(self.weights + epsilon)
                for group, epsilon in zip(self.groups, self.epsilons(), strict=True)
            ]
        return torch.stack(parts).mean(0) + self.weight_decay * self.weights

    def stationarity(self) -> float:
        """Return ``|G| / (lambda |w| + N)``: how far from a fixed point, as a part of its terms."""
        norms = torch.stack([found.norm for found in self.perturbations])
        scale = torch.linalg.vector_norm(self.weight_decay * self.weights) + norms.mean()
        return float(torch.linalg.vector_norm(self.residual()) / scale)

    def kappa(self, steps: int = 50, seed: int = 0) -> float:
        """Return ``s |P H P|``, the largest of all batches: how much eps moves with the weights.

        It is of the order of ``rho |H| / N``, so that it is large where gradients are small, and
        near 0 where frozen perturbations are as good.

        Args:
            steps: Of a power iteration.
            seed: Of where it begins.
        """
        generator = torch.Generator(self.weights.device).manual_seed(seed)
        worst = 0.0
        for group, found in zip(self.groups, self.perturbations, strict=True):
            x = torch.randn(
                len(self), generator=generator, dtype=self.weights.dtype, device=self.weights.device
            )
            size = x.new_zeros(())
            for _ in range(steps):
                x = found.project(x)
                x = x / torch.linalg.vector_norm(x).clamp(min=torch.finfo(x.dtype).tiny)
                x = found.project(group.hessian(self.weights, x))
                size = torch.linalg.vector_norm(x)
            worst = max(worst, float(found.scale * size))
        return worst

    # --- its Jacobian ----------------------------------------------------------------------------

    def _worst(self, group: BatchLoss) -> Callable[..., Tensor]:
        """Return ``L(w + eps(w))`` as a function of w, through eps."""

        def worst(vector: Tensor, weights: Tensor = self.sample_weights) -> Tensor:
            gradient = grad(group.loss)(vector, weights)
            found = Perturbation(vector, gradient, self.rho, self.adaptive, self.norm_eps)
            return group.loss(vector + found.epsilon, weights)

        return worst

    def matvec(self, x: Tensor) -> Tensor:
        """Return the Jacobian times a vector, ``(p,)``."""
        total = self.weight_decay * x
        for index, group in enumerate(self.groups):
            total = total + self._product(index, group, x) / len(self.groups)
        return total

    def _product(self, index: int, group: BatchLoss, x: Tensor) -> Tensor:
        if self.mode == "objective":
            return jvp(grad(self._worst(group)), (self.weights,), (x,))[1]
        epsilon = self.epsilons()[index]
        at = self.weights + epsilon
        if self.mode == "field":
            change = group.hessian(self.weights, x)
            return group.hessian(at, x + self.perturbations[index].tangent(change, x))
        product = group.hessian(at, x)
        if self.mode == "envelope":
            product = product + group.hessian(at, self._followed(group, epsilon, product))
        return product

    def rmatvec(self, y: Tensor) -> Tensor:
        """Return the transposed Jacobian times a vector, ``(p,)``."""
        if self.mode != "field":
            # symmetric
            return self.matvec(y)
        total = self.weight_decay * y
        for group, found in zip(self.groups, self.perturbations, strict=True):
            product = group.hessian(self.weights + found.epsilon, y)
            gradient, moved = found.adjoint(product)
            part = product + group.hessian(self.weights, gradient)
            part = part if moved is None else part + moved
            total = total + part / len(self.groups)
        return total

    def _followed(self, group: BatchLoss, epsilon: Tensor, x: Tensor) -> Tensor:
        """Return ``P (mu - P H~ P)^+ P x``: how the exact maximiser follows the gradient."""
        from scipy.sparse.linalg import cg

        at = self.weights + epsilon
        unit = epsilon / torch.linalg.vector_norm(epsilon)
        mu = torch.linalg.vector_norm(group.gradient(at)) / self.rho

        def project(v: Tensor) -> Tensor:
            return v - unit * (unit @ v)

        def product(v: Any) -> Any:
            given = torch.from_numpy(v.copy()).to(x)
            inner = project(given)
            # the identity off the sphere keeps the matrix whole; what it gives is projected away
            found = mu * inner - project(group.hessian(at, inner)) + (unit @ given) * unit
            if not given @ found > 0 and given.any():
                raise ConvergenceError(
                    "mode: the largest loss nearby is no strict maximum (mu < P H~ P), and does "
                    "not follow the weights; take a smaller rho, or mode='field'"
                )
            return found.double().cpu().numpy()

        tight = 1e-12 if x.dtype == torch.float64 else 1e-6
        found, failed = cg(
            self._operator(product, product), project(x).double().cpu().numpy(), rtol=tight,
            maxiter=_STEPS,
        )  # fmt: skip
        if failed:
            raise ConvergenceError(
                f"mode: how the exact maximiser follows was not found in {_STEPS} steps; take a "
                "smaller rho, or mode='field'"
            )
        return project(torch.from_numpy(found).to(x))

    def dense(self) -> Tensor:
        """Return the Jacobian, ``(p, p)``; p products."""
        eye = torch.eye(len(self), dtype=self.weights.dtype, device=self.weights.device)
        return torch.stack([self.matvec(column) for column in eye], 1)

    def to_scipy(self) -> LinearOperator:
        """Return it as scipy's solvers take it, in float64 on the CPU."""

        def through(product: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def run(x: Any) -> Any:
                return product(torch.from_numpy(x.copy()).to(self.weights)).double().cpu().numpy()

            return run

        return self._operator(through(self.matvec), through(self.rmatvec))

    def _operator(
        self, matvec: Callable[[Any], Any], rmatvec: Callable[[Any], Any]
    ) -> LinearOperator:
        from scipy.sparse import linalg

        # made of functions, which the annotations of its class do not know
        make: Any = linalg.LinearOperator
        return make((len(self), len(self)), matvec=matvec, rmatvec=rmatvec, dtype="float64")

    # --- samples ---------------------------------------------------------------------------------

    def source_dots(self, y: Tensor) -> Tensor:
        """Return ``<dG / da_i, y>`` of all samples, ``(n,)``.

        A sample pulls where the weights are moved to, and moves the perturbation too:
        ``dG / da_i = (grad l_i(w~) + s H~ P grad l_i(w)) / n``. Both products with y are
        derivatives of the losses of samples along a direction, so that no gradient of a sample is
        ever made.

        Args:
            y: ``(p,)``.
        """
        found = []
        for index, group in enumerate(self.groups):
            if self.mode == "objective":
                found.append(self._objective_dots(group, y))
                continue
            epsilon = self.epsilons()[index]
            at = self.weights + epsilon
            if self.mode == "envelope":
                y_here = y + self._followed(group, epsilon, group.hessian(at, y))
                found.append(group.directional(at, y_here))
                continue
            if self.mode == "frozen":
                found.append(group.directional(at, y))
                continue
            product, dots = group.both(at, y)
            gradient, _ = self.perturbations[index].adjoint(product)
            found.append(dots + group.directional(self.weights, gradient))
        return torch.cat(found) / len(self.groups)

    def losses_along(self, sample: int, x: Tensor) -> Tensor:
        """Return how a training sample's own loss changes along a direction, 0-dimensional.

        Args:
            sample: Its number.
            x: ``(p,)``.
        """
        for group in self.groups:
            for batch, place, _ in group.batches:
                if place.start <= sample < place.stop:
                    losses = lambda w, batch=batch: self.vector.losses(w, batch)  # noqa: E731
                    return jvp(losses, (self.weights,), (x,))[1][sample - place.start]
        remedy = "a number of the training data"
        raise ValueError(message("sample", f"one below {self.count}", sample, remedy))

    def source(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_i c_i dG / da_i``, ``(p,)``: how the field moves with a group of samples.

        Args:
            coefficients: c, ``(n,)``.

        Raises:
            ValueError: Another number of them.
        """
        if coefficients.shape != (self.count,):
            remedy = "one for each sample of the data"
            got = tuple(coefficients.shape)
            raise ValueError(message("coefficients", f"({self.count},)", got, remedy))
        c, total = coefficients.to(self.weights), torch.zeros_like(self.weights)
        for index, group in enumerate(self.groups):
            total = total + self._source(index, group, c) / len(self.groups)
        return total

    def _source(self, index: int, group: BatchLoss, c: Tensor) -> Tensor:
        if self.mode == "objective":
            worst = self._worst(group)
            by_vector = lambda weights: grad(worst)(self.weights, weights)  # noqa: E731
            return jvp(by_vector, (self.sample_weights,), (c,))[1]
        epsilon = self.epsilons()[index]
        at = self.weights + epsilon
        pull = group.gradient(at, c)
        if self.mode == "frozen":
            return pull
        if self.mode == "envelope":
            return pull + group.hessian(at, self._followed(group, epsilon, pull))
        change = self.perturbations[index].tangent(group.gradient(self.weights, c))
        return pull + group.hessian(at, change)

    def _objective_dots(self, group: BatchLoss, y: Tensor) -> Tensor:
        """``d/da <grad F, y>``: the derivative along y of F's derivatives by sample weights."""
        worst = self._worst(group)
        places = torch.cat([
            torch.arange(place.start, place.stop, device=y.device) for _, place, _ in group.batches
        ])  # fmt: skip
        by_weights = lambda vector: grad(worst, argnums=1)(vector, self.sample_weights)  # noqa: E731
        return jvp(by_weights, (self.weights,), (y,))[1][places]
