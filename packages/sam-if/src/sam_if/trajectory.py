"""The record of a run: weights, batches and rates of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor, nn

from sam_if.batches import BatchLoss
from sam_if.dynamics import dynamics_of
from sam_if.errors import TrajectoryError, UnsupportedOptimizerError
from sam_if.objective import ParameterVector
from sam_if.perturbation import Perturbation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam_if.dynamics import SGD, Adam
    from sam_if.objective import Objective
    from sam_if.optim import SAM

#: How far a step may be from its record, as a part of its length, by dtype.
_FAR = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class Step:
    """A step of SAM, as it was begun.

    Attributes:
        weights: ``(p,)`` before it.
        batch: That its gradients are of.
        samples: Numbers of the batch's samples among the training data.
        lr: Rate of learning; ``(p,)`` where groups of parameters differ.
        weight_decay: The same.
        rho: Radius of the neighbourhood.
    """

    weights: Tensor
    batch: Any
    samples: tuple[int, ...]
    lr: float | Tensor
    weight_decay: float | Tensor
    rho: float


class Trajectory:
    """A run of SAM that is recorded while it is made.

    ``record`` is called before each step with the batch and the numbers of its samples, and
    ``check`` afterwards, which makes every step anew and compares:

        trajectory = Trajectory(model, classification(), optimizer)
        for batch, samples in batches:
            trajectory.record(batch, samples)
            ...  # both gradients, of the mean of the batch's losses, and both steps

    All weights are kept: ``steps * p`` numbers, on the model's device.

    Args:
        model: That is trained: in float32 or float64, without dropout, and without batch norm in
            training mode, which couples the samples of a batch.
        objective: Its losses.
        optimizer: SAM or ASAM around SGD, Adam or AdamW of torch, of all the model's trained
            parameters, before its first step.
        max_grad_norm: To which gradients at the moved weights are clipped before ``second_step``,
            by ``torch.nn.utils.clip_grad_norm_``; None if they are not.

    Attributes:
        vector: Trained parameters as one vector.
        steps: Recorded so far.
        adaptive: Whether it is ASAM.

    Raises:
        UnsupportedOptimizerError: Another optimizer, or options of it that have no adjoint here.
        ValueError: A model that cannot be recorded, or parameters that are not the optimizer's.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: SAM,
        *,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_model(model)
        self.vector = ParameterVector(model, objective)
        self._model, self._optimizer = model, optimizer
        self.max_grad_norm = max_grad_norm
        # refused now rather than behind a run
        dynamics_of(optimizer.base_optimizer, max_grad_norm)
        groups = optimizer.param_groups
        kinds = {(group["rho"], group["adaptive"]) for group in groups}
        if len(kinds) > 1 or optimizer.perturb_decay:
            raise UnsupportedOptimizerError(
                "optimizer: expected one rho and one kind of SAM for all parameters, without "
                "perturb_decay; groups may differ in lr and weight_decay"
            )
        if optimizer.state:
            raise UnsupportedOptimizerError(
                "optimizer: expected one that has not stepped yet, got moments of earlier steps; "
                "a record begins with the run"
            )
        self.adaptive: bool = groups[0]["adaptive"]
        self.steps: list[Step] = []
        named = {id(p): name for name, p in model.named_parameters()}
        held = {named.get(id(p)) for group in groups for p in group["params"] if p.requires_grad}
        if held != set(self.vector.names):
            differ = sorted(str(name) for name in held ^ set(self.vector.names))
            remedy = "give it all of the model's trained parameters, and no others"
            raise ValueError(message("optimizer", "the model's parameters", differ[:3], remedy))
        self._named = named

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def count(self) -> int:
        """Samples there are: one more than the largest number."""
        return 1 + max((max(step.samples) for step in self.steps), default=-1)

    @property
    def weights(self) -> Tensor:
        """The model's weights now, ``(p,)``."""
        return self.vector.read()

    def record(self, batch: Any, samples: Sequence[int] | Tensor) -> None:
        """Write down what the next step begins with.

        Args:
            batch: As the objective takes it; it is kept as it is, and must not be changed.
            samples: Numbers of its samples among the training data; one that is there twice
                counts twice.

        Raises:
            RuntimeError: The weights are between the two steps of SAM.
            ValueError: Numbers that are negative, or not as many as the batch's losses.
        """
        if self._optimizer.perturbed:
            raise RuntimeError("record: the weights are moved; call it before first_step")
        numbers = tuple(int(n) for n in samples)
        weights = self.vector.read()
        with torch.no_grad():
            size = len(self.vector.losses(weights, batch))
        if len(numbers) != size or min(numbers, default=0) < 0:
            remedy = "one for each sample of the batch"
            raise ValueError(message("samples", f"{size} numbers of at least 0", numbers, remedy))
        rho = float(self._optimizer.param_groups[0]["rho"])
        rate, decay = self._option("lr"), self._option("weight_decay")
        self.steps.append(Step(weights, batch, numbers, rate, decay, rho))

    def _option(self, name: str) -> float | Tensor:
        """Return an option of the groups, by parameter where they differ."""
        groups = self._optimizer.param_groups
        values = [float(group[name]) for group in groups]
        if len(set(values)) == 1:
            return values[0]
        by_name = {
            self._named[id(p)]: value
            for group, value in zip(groups, values, strict=True)
            for p in group["params"]
            if p.requires_grad
        }
        like = self.vector.read()
        return torch.cat([
            like.new_full((size,), by_name[parameter])
            for parameter, size in zip(self.vector.names, self.vector.sizes, strict=True)
        ])  # fmt: skip

    def loss(self, step: Step) -> BatchLoss:
        """Return the loss of a step's batch."""
        size = len(step.samples)
        ones = step.weights.new_ones(size)
        return BatchLoss(self.vector, [(step.batch, slice(0, size))], size, ones)

    def perturbation(self, step: Step, loss: BatchLoss) -> Perturbation:
        """Return how a step's weights were moved."""
        gradient = loss.gradient(step.weights)
        return Perturbation(
            step.weights, gradient, step.rho, self.adaptive, self._optimizer.norm_eps
        )

    def dynamics(self) -> SGD | Adam:
        """Return what the optimizer made of the run's gradients.

        Where an adjoint needs them, all are made anew: two gradients a step.
        """
        found = dynamics_of(self._optimizer.base_optimizer, self.max_grad_norm)
        if found.remembers:
            for step in self.steps:
                found.forward(step, self._gradient(step))
        return found

    def _gradient(self, step: Step) -> Tensor:
        """Return the gradient at a step's moved weights."""
        loss = self.loss(step)
        return loss.gradient(step.weights + self.perturbation(step, loss).epsilon)

    def check(self) -> float:
        """Make every step anew from its record, and return how far the worst is from it.

        What is compared is the change of the weights, and how far is a part of its length. A run
        with clipped gradients that it was not told of, with dropout, another loss, or a scheduler
        that came between ``record`` and the step is found out.

        Raises:
            TrajectoryError: A step is not what its record says.
        """
        worst, made = 0.0, dynamics_of(self._optimizer.base_optimizer, self.max_grad_norm)
        after = [step.weights for step in self.steps[1:]] + [self.weights]
        for index, (step, found) in enumerate(zip(self.steps, after, strict=True)):
            wanted = made.forward(step, self._gradient(step))
            apart = torch.linalg.vector_norm(found - step.weights - wanted)
            # what rounding of the weights themselves does
            size = torch.linalg.vector_norm(wanted)
            size = size + torch.finfo(found.dtype).eps * torch.linalg.vector_norm(found)
            far = float(apart / size.clamp(min=torch.finfo(found.dtype).tiny))
            if not far <= _FAR[found.dtype]:
                raise TrajectoryError(
                    f"step {index}: the weights did not move as recorded, but by {far:.2g} of the "
                    "step otherwise; is the loss the mean of the batch's losses, are gradients "
                    "clipped (max_grad_norm), or was record called before a schedule's step?"
                )
            worst = max(worst, far)
        return worst


def _check_model(model: nn.Module) -> None:
    """Refuse a model whose steps depend on chance, or whose samples depend on each other."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            remedy = "call eval() on it"
            raise ValueError(message("model", "no dropout", f"{name}.p = {module.p}", remedy))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            remedy = "call eval() on it: its statistics couple the samples of a batch"
            raise ValueError(message("model", "no batch norm in training", name, remedy))
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if wrong := sorted(str(kind) for kind in kinds - set(_FAR)):
        remedy = "differences of gradients are noise in 16 bits: model.float()"
        raise ValueError(message("model", "float32 or float64", wrong, remedy))
