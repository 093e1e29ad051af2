"""The record of a run: weights, batches and rates of its steps, kept or made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor

from sam_if.dynamics import dynamics_of
from sam_if.errors import TrajectoryError, UnsupportedOptimizerError
from sam_if.objective import objective_of
from sam_if.records import WEIGHTS, FolderSnapshots, RunFolder, StepRecord, fingerprint, flat_batch
from sam_if.requirements import check_model
from sam_if.run import RecordedRun, batch_bits

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import nn

    from sam_if.objective import Objective
    from sam_if.optim import SAM

STORAGES = ("all", "sqrt")


class Trajectory(RecordedRun):
    """A run of SAM that is recorded while it is made.

        trajectory = Trajectory(model, classification(), optimizer)
        for batch, samples in batches:
            loss = trajectory.step(batch, samples)

    ``step`` takes a whole step of SAM. In a loop of one's own ``record`` is called before each
    step instead, and ``check`` afterwards, which makes every step anew and compares.

    With ``storage="all"`` the weights and moments of every step are kept. With ``"sqrt"`` they are
    of about the root of all steps, and others are made again when they are asked for, which is a
    SAM step each; they are compared with 64 bits that were kept of them, so that it is the run
    itself or an error. What is kept is in host memory, or in files of a folder, and is copied
    while the device computes.

    Args:
        model: That is trained: in float32 or float64, without dropout, and without batch norm in
            training mode, which couples the samples of a batch.
        objective: Its losses.
        optimizer: SAM or ASAM around SGD, Adam or AdamW of torch, of all the model's trained
            parameters. If it has stepped before, moments of then count for constants.
        max_grad_norm: To which gradients at the moved weights are clipped before ``second_step``,
            by ``torch.nn.utils.clip_grad_norm_``; None if they are not.
        folder: A new one; by default all is in memory.
        storage: ``all`` or ``sqrt``.
        batch_of: Makes the batch of some samples of the numbers that they have, so that batches
            are not kept; it must always be the same one.

    Attributes:
        model: As given.
        vector: Its trained parameters as one vector.
        objective: As given.
        records: Of each step.
        adaptive: Whether it is ASAM.

    Raises:
        FileExistsError: The folder is not empty.
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
        folder: str | os.PathLike[str] | None = None,
        storage: str = "all",
        batch_of: Callable[[Sequence[int]], Any] | None = None,
    ) -> None:
        check_choice("storage", storage, STORAGES)
        settings = _settings(model, optimizer, max_grad_norm)
        spec = getattr(objective, "spec", None)
        settings |= {"storage": storage, "objective": spec, "batches": batch_of is None}
        files = RunFolder(folder) if folder else None
        if files:
            files.begin(settings)
        super().__init__(model, objective, settings, files, batch_of)
        self._optimizer: SAM | None = optimizer
        self._every = 1

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        objective: Objective | None = None,
        *,
        batch_of: Callable[[Sequence[int]], Any] | None = None,
    ) -> Trajectory:
        """Read a run.

        Of one that was interrupted the last step that was begun does not count.

        Args:
            folder: That it was recorded to.
            model: With the parameters that were trained, of whatever values; others must be as
                they were.
            objective: That it was recorded with; None for a ready-made one.
            batch_of: If it was recorded with one.

        Raises:
            FileNotFoundError: It is no run's folder.
            ValueError: Another model or objective.
        """
        return cls._read(folder, model, objective, batch_of)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: SAM,
        objective: Objective | None = None,
        *,
        at: int,
        batch_of: Callable[[Sequence[int]], Any] | None = None,
    ) -> Trajectory:
        """Go on with a run that was interrupted; what was recorded from a step on is forgotten.

        Args:
            folder: That it was recorded to.
            model: With the weights before that step.
            optimizer: With its state before that step.
            objective: As in `open`.
            at: Number of the step.
            batch_of: As in `open`.

        Raises:
            TrajectoryError: Weights or moments are not those that the step began with.
            ValueError: There is no such step, or other options than it was recorded with.
        """
        made = cls._read(folder, model, objective, batch_of, cut=at)
        now = _settings(model, optimizer, made.max_grad_norm)
        fixed = ("optimizer", "adaptive", "norm_eps")
        differ = [name for name in fixed if now[name] != made._settings[name]]
        if differ:
            remedy = "go on with the options that it began with"
            raise ValueError(message("optimizer", f"the run's {differ[0]}", now[differ[0]], remedy))
        made._optimizer = optimizer
        return made

    @classmethod
    def _read(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        objective: Objective | None,
        batch_of: Callable[[Sequence[int]], Any] | None,
        cut: int | None = None,
    ) -> Trajectory:
        files = RunFolder(folder)
        settings, records = files.read()
        if objective is None:
            if settings["objective"] is None:
                remedy = "give the one that it was recorded with"
                raise ValueError(message("objective", "the run's own", None, remedy))
            objective = objective_of(settings["objective"])
        if settings["batches"] != (batch_of is None):
            expected = "no function" if settings["batches"] else "the run's function"
            remedy = "batches are in the folder" if settings["batches"] else "they were not kept"
            raise ValueError(message("batch_of", expected, batch_of, remedy))
        expected, got = settings["weights"], _shapes(model)
        if expected != got:
            remedy = "give the model that was trained"
            differ = sorted(n for n in expected | got if expected.get(n) != got.get(n))
            raise ValueError(message("model", "the run's parameters", differ[:3], remedy))
        made = cls.__new__(cls)
        RecordedRun.__init__(made, model, objective, settings, files, batch_of)
        made._optimizer, made._every = None, 1
        made._final = settings.get("final")
        if cut is not None:
            made._cut(records, cut)
        elif made._final is None and records:
            made._final = records[-1].weights
            records = records[:-1]
        made.records = records if cut is None else records[:cut]
        held = made._snapshots.held()
        if made.records and (not held or held[0] != 0):
            raise TrajectoryError(f"{files.path}: the weights before step 0 are missing")
        return made

    def _cut(self, records: list[StepRecord], at: int) -> None:
        """Forget steps from one on, if the weights are those that it began with."""
        final = self._settings.pop("final", None)
        self._final = None
        hashes = [record.weights for record in records] + ([] if final is None else [final])
        if not 0 <= at < len(hashes):
            remedy = "one that was begun"
            raise ValueError(message("at", f"a step in 0 to {len(hashes) - 1}", at, remedy))
        if fingerprint(self.vector.read()) != hashes[at]:
            raise TrajectoryError(
                f"step {at}: the model's weights are not those that it began with; load the "
                "checkpoint of that step"
            )
        assert self._folder and self._files
        for index in self._snapshots.held():
            if index >= at:
                self._snapshots.drop(index)
        for index in range(at, len(records)):
            self._files.drop(index)
        self._folder.cut(records[:at])
        self._folder.finish(self._settings)
        held = self._snapshots.held()
        self._every = held[1] - held[0] if len(held) > 1 else 1

    # --- recording -------------------------------------------------------------------------------

    def step(self, batch: Any, samples: Sequence[int] | Tensor) -> Tensor:
        """Record a step and take it.

        Args:
            batch: As the objective takes it.
            samples: Numbers of its samples among the training data; one that is there twice
                counts twice.

        Returns:
            The mean of the losses before it, 0-dimensional.

        Raises:
            RuntimeError: Weights are between the two steps of SAM, or the run is finished.
            ValueError: Numbers that are negative, or not one for each sample.
        """
        return self.step_window([(batch, samples)])

    def step_window(self, parts: Sequence[tuple[Any, Sequence[int] | Tensor]]) -> Tensor:
        """Record a step of several micro-batches and take it; they have one perturbation.

        How much each counts is how many samples it has, or what else the objective says.

        Args:
            parts: Batches with the numbers of their samples, as in `step`.
        """
        self.record_window(parts)
        assert self._optimizer is not None
        return self._take(self._optimizer, [batch for batch, _ in parts], self.records[-1])

    def gradient_window(self, parts: Sequence[tuple[Any, Sequence[int] | Tensor]]) -> Tensor:
        """Record a step and take its gradients, for somebody who clips and steps by the second.

        As `step_window`, but for that: the weights are back where they were.
        """
        self.record_window(parts)
        assert self._optimizer is not None
        loss = self.gradients(self._optimizer, [batch for batch, _ in parts], self.records[-1])
        self._optimizer.restore()
        return loss

    def record(self, batch: Any, samples: Sequence[int] | Tensor) -> None:
        """Write down what the next step begins with; as `step`, which somebody else takes."""
        self.record_window([(batch, samples)])

    def record_window(self, parts: Sequence[tuple[Any, Sequence[int] | Tensor]]) -> None:
        """Write down what the next step begins with; as `step_window`."""
        if self._optimizer is None or self._final is not None:
            raise RuntimeError("record: the run is finished; make another, or resume it")
        if self._optimizer.perturbed:
            raise RuntimeError("record: the weights are moved; call it before first_step")
        check_model(self.model)
        numbers = tuple(
            tuple(samples.tolist() if isinstance(samples, Tensor) else map(int, samples))
            for _, samples in parts
        )
        for (batch, _), own in zip(parts, numbers, strict=True):
            rows = _rows(batch)
            if min(own, default=-1) < 0 or rows not in (None, len(own)):
                expected = "numbers" if rows is None else f"{rows} numbers"
                remedy = "one for each sample of the batch"
                raise ValueError(message("samples", f"{expected} of at least 0", own, remedy))
        index, made, groups = len(self), [batch for batch, _ in parts], self._optimizer.param_groups
        if self._files and self._batch_of is None:
            self._files.put(index, made)
        elif self._batch_of is None:
            self._kept[index] = made
        weights, moments = self.vector.read(), self._moments(self._optimizer)
        record = StepRecord(
            numbers,
            tuple(float(group["lr"]) for group in groups),
            tuple(float(group["weight_decay"]) for group in groups),
            float(groups[0]["rho"]),
            self._taken(self._optimizer),
            fingerprint(weights),
            fingerprint(*moments.values()),
            () if self._batch_of is None else tuple(batch_bits(batch) for batch in made),
        )
        if not index % self._every:
            self._snapshots.put(index, {WEIGHTS: weights, **moments})
            self._thin()
        self.records.append(record)
        if self._folder:
            self._folder.append(record)

    def _thin(self) -> None:
        """Keep about as many snapshots as there are steps between them."""
        if self._settings["storage"] == "all" or len(self._snapshots.held()) <= 2 * self._every:
            return
        self._every *= 2
        for index in self._snapshots.held():
            if index % self._every:
                self._snapshots.drop(index)

    @property
    def finished(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._final is not None

    def finish(self) -> None:
        """Keep the weights behind the last step; nothing is recorded afterwards.

        Raises:
            RuntimeError: Weights are between the two steps of SAM, or it is finished.
        """
        if self._optimizer is None or self._final is not None:
            raise RuntimeError("finish: the run is finished already")
        if self._optimizer.perturbed:
            raise RuntimeError("finish: the weights are moved; call second_step before it")
        weights = self.vector.read()
        self._final = fingerprint(weights)
        self._snapshots.put(len(self), {WEIGHTS: weights})
        if self._folder and isinstance(self._snapshots, FolderSnapshots):
            self._snapshots.wait()
            self._folder.finish({**self._settings, "final": self._final})


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def _settings(model: nn.Module, optimizer: SAM, max_grad_norm: float | None) -> dict[str, Any]:
    """Return what has to be known of an optimizer, as JSON has it.

    Raises:
        UnsupportedOptimizerError: Its steps have no adjoint here.
    """
    groups = optimizer.param_groups
    kind = type(optimizer.base_optimizer)
    dynamics_of(kind, groups, max_grad_norm)
    kinds = {(group["rho"], group["adaptive"]) for group in groups}
    if len(kinds) > 1 or optimizer.perturb_decay:
        raise UnsupportedOptimizerError(
            "optimizer: expected one rho and one kind of SAM for all parameters, without "
            "perturb_decay; groups may differ in lr and weight_decay"
        )
    named = {id(p): name for name, p in model.named_parameters()}
    plain = (bool, int, float, str, list, tuple, type(None))
    made = []
    for group in groups:
        options = {name: value for name, value in group.items() if isinstance(value, plain)}
        options["lr"] = float(group["lr"])
        held = [named.get(id(p), "a parameter of another model")
                for p in group["params"] if p.requires_grad]  # fmt: skip
        made.append({**options, "params": held})
    return {
        "optimizer": kind.__name__, "groups": made, "adaptive": groups[0]["adaptive"],
        "norm_eps": optimizer.norm_eps, "max_grad_norm": max_grad_norm, "torch": torch.__version__,
        "weights": _shapes(model),
    }  # fmt: skip


def _rows(batch: Any) -> int | None:
    """Return how many samples a batch has, if that can be seen."""
    try:
        return len(next(iter(flat_batch(batch).values())))
    except (ValueError, TypeError, StopIteration):
        return None
