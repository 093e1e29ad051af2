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

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message
from torch import Tensor
from torch.func import grad, vmap
from tqdm.auto import tqdm

from sam_if.objective import query_gradients
from sam_if.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sam_if.batches import BatchLoss
    from sam_if.perturbation import Perturbation
    from sam_if.records import Step
    from sam_if.run import RecordedRun

HESSIANS = ("full", "frozen", "none")


class TrajectoryInfluence:
    """Scores of training samples by the run that they were part of.

    Args:
        trajectory: A record, which is checked.
        hessian: ``full`` is exact; ``frozen`` takes perturbations for constants; ``none`` leaves
            Hessians out, so that a sample's gradients count by rates of learning and momentum
            alone, as in gradient tracing.
        check: Whether to make the steps anew first, and refuse a run that is not as recorded, or a
            model whose second derivatives are not right.

    Raises:
        DerivativeError: Some operation has wrong derivatives.
        TrajectoryError: It is not.
        ValueError: No steps, or an unknown option.
    """

    def __init__(
        self, trajectory: RecordedRun, hessian: str = "full", *, check: bool = True
    ) -> None:
        check_choice("hessian", hessian, HESSIANS)
        if not len(trajectory):
            raise ValueError(message("trajectory", "recorded steps", 0, "call record before each"))
        self.trajectory, self.hessian = trajectory, hessian
        if check:
            trajectory.check()
            first = next(iter(trajectory.forwards()))
            trajectory.loss(first).derivative_error(first.weights)

    def scores(
        self,
        queries: Iterable[Any],
        *,
        mean: bool = False,
        together: int = 8,
        progress: bool = False,
    ) -> Scores:
        """Return by how much each query would rise if a training sample had not been there.

        Its places in batches would have stayed empty: what is divided by does not change.

        Args:
            queries: Batches, as the objective measures them.
            mean: Ask for the mean over all of them, for one pass through the run.
            together: Queries that go through the run at a time. They share each step's gradient
                and what is computed before their directions come in; memory grows with them.
            progress: Show a bar.

        Raises:
            ValueError: No queries, or less than one at a time.
        """
        check_range("together", together, 1, 1 << 31, "as many as memory allows")
        run = self.trajectory
        asked = query_gradients(run.vector, run.weights, queries, mean)
        parts = torch.stack(asked).split(together)
        with tqdm(total=_steps(run, len(asked), together), desc="adjoint", unit="step",
                  disable=not progress) as bar:  # fmt: skip
            values = torch.cat([self.backwards(part, bar) for part in parts])
        return Scores(-values, f"trajectory, {self.hessian}")

    def self_influence(
        self, samples: Iterable[int], *, together: int = 8, progress: bool = False
    ) -> Tensor:
        """Return by how much what is measured of each sample would rise without it, ``(m,)``.

        A sample that the model could only learn by heart has much. It takes as much as a query for
        each, so that a shortlist, of those with the largest losses, is what to ask for.

        Args:
            samples: Numbers of the training data.
            together: As in `scores`.
            progress: Show a bar.

        Raises:
            ValueError: A number that no recorded batch has.
        """
        run, numbers = self.trajectory, list(samples)
        check_range("together", together, 1, 1 << 31, "as many as memory allows")
        at = run.weights

        def gradient(number: int) -> Tensor:
            batch, place = run.sample(number)
            return grad(lambda w: run.vector.losses(w, batch, measured=True)[place])(at)

        found = []
        with tqdm(total=_steps(run, len(numbers), together), desc="adjoint", unit="step",
                  disable=not progress) as bar:  # fmt: skip
            for begin in range(0, len(numbers), together):
                own = numbers[begin : begin + together]
                part = torch.stack([gradient(n) for n in own])
                found.append(-self.backwards(part, bar)[torch.arange(len(own)), own])
        return torch.cat(found) if found else at.new_zeros(0)

    def backwards(self, w: Tensor, bar: Any) -> Tensor:
        """Return the derivatives of queries by the weights of samples, ``(Q, n)``.

        Args:
            w: Derivatives of the queries by the weights at the end, ``(Q, p)``.
            bar: Whose ``update`` is called behind each step.

        Raises:
            TrajectoryError: A step cannot be made again.
        """
        run = self.trajectory
        found, back = w.new_zeros(len(w), run.count), run.dynamics.reverse()
        for step in run.backwards():
            loss = run.loss(step)
            moved = run.perturbation(step, loss)
            at = step.weights + moved.epsilon
            gradient = loss.gradient(at) if run.dynamics.needs_gradient else None
            v, w = back(step, gradient, w)
            change, dots = self._through(step, loss, moved, v)
            w = w + change
            found.index_add_(1, torch.tensor(step.samples, device=w.device), dots)
            bar.update()
        return found

    def _through(
        self, step: Step, loss: BatchLoss, moved: Perturbation, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the weights and the samples have to do with a step's gradient along v."""
        at = step.weights + moved.epsilon
        if self.hessian == "none":
            return torch.zeros_like(v), vmap(partial(loss.directional, at))(v)
        product, dots = vmap(partial(loss.both, at))(v)
        if self.hessian == "frozen":
            return product, dots
        gradient, weights = moved.adjoint(product)
        second, more = vmap(partial(loss.both, step.weights))(gradient)
        change = product + second
        return change if weights is None else change + weights, dots + more


def _steps(run: RecordedRun, queries: int, together: int) -> int:
    """Return how many steps backwards some queries take."""
    return len(run) * -(-queries // together)
