"""Influence through a whole run: the adjoint of SAM around an optimizer, step by step backwards.

From the gradient w' of a query at the end on, an optimizer's own adjoint (`sam_if.dynamics`) gives
v', that of the gradient at the moved weights ``w~ = w_t + eps_t``. Then

    y = H~ v',  (z, x) = adjoints of eps_t by y
    a'_i += (<grad l_i(w~), v'> + <grad l_i(w_t), z>) / b
    w' += y + H z + x

where z is ``s P y``, and x is 0 for SAM. Nothing is dropped: for the run that was recorded they are
its derivatives. A step costs two products with Hessians, which give the samples' dots for nothing,
and a gradient, however many samples there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor
from tqdm.auto import tqdm

from sam_if.objective import query_gradients
from sam_if.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sam_if.trajectory import Step, Trajectory

HESSIANS = ("full", "frozen", "none")


class TrajectoryInfluence:
    """Scores of training samples by the run that they were part of.

    Args:
        trajectory: A record, which is checked.
        hessian: ``full`` is exact; ``frozen`` takes perturbations for constants; ``none`` leaves
            Hessians out, so that a sample's gradients count by rates of learning and momentum
            alone, as in gradient tracing.
        check: Whether to make the steps anew first, and refuse a run that is not as recorded.

    Raises:
        TrajectoryError: It is not.
        ValueError: No steps, or an unknown option.
    """

    def __init__(
        self, trajectory: Trajectory, hessian: str = "full", *, check: bool = True
    ) -> None:
        check_choice("hessian", hessian, HESSIANS)
        if not len(trajectory):
            raise ValueError(message("trajectory", "recorded steps", 0, "call record before each"))
        self.trajectory, self.hessian = trajectory, hessian
        if check:
            trajectory.check()
        self._dynamics = trajectory.dynamics()

    def scores(
        self, queries: Iterable[Any], *, mean: bool = False, progress: bool = False
    ) -> Scores:
        """Return by how much each query would rise if a training sample had not been there.

        Its places in batches would have stayed empty: what is divided by does not change.

        Args:
            queries: Batches, as the objective measures them.
            mean: Ask for the mean over all of them, for one pass through the run.
            progress: Show a bar.

        Raises:
            ValueError: No queries.
        """
        run = self.trajectory
        asked = query_gradients(run.vector, run.weights, queries, mean)
        steps = len(run) * len(asked)
        with tqdm(total=steps, desc="adjoint", unit="step", disable=not progress) as bar:
            values = torch.stack([self._backwards(gradient, bar) for gradient in asked])
        return Scores(-values, f"trajectory, {self.hessian}")

    def _backwards(self, w: Tensor, bar: Any) -> Tensor:
        """Return the derivatives of a query by the weights of samples, ``(n,)``."""
        run = self.trajectory
        found, back = w.new_zeros(run.count), self._dynamics.reverse()
        for index in range(len(run) - 1, -1, -1):
            step = run.steps[index]
            v, w = back(index, step, w)
            change, dots = self._step(step, v)
            w = w + change
            found.index_add_(0, torch.tensor(step.samples, device=w.device), dots)
            bar.update()
        return found

    def _step(self, step: Step, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the weights and the samples have to do with a step's gradient along v."""
        run = self.trajectory
        loss = run.loss(step)
        moved = run.perturbation(step, loss)
        at = step.weights + moved.epsilon
        if self.hessian == "none":
            return torch.zeros_like(v), loss.directional(at, v)
        product, dots = loss.both(at, v)
        if self.hessian == "frozen":
            return product, dots
        gradient, weights = moved.adjoint(product)
        second, more = loss.both(step.weights, gradient)
        change = product + second
        return change if weights is None else change + weights, dots + more
