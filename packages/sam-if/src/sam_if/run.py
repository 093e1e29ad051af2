"""A recorded run: its steps, from the first to the last or back, kept or made again."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor, nn
from tqdm.auto import tqdm

from sam_if.batches import BatchLoss
from sam_if.dynamics import dynamics_of
from sam_if.errors import TrajectoryError
from sam_if.objective import ParameterVector
from sam_if.optim import SAM
from sam_if.perturbation import Perturbation
from sam_if.records import (
    WEIGHTS,
    Batches,
    FolderSnapshots,
    HostSnapshots,
    RunFolder,
    Snapshots,
    Step,
    StepRecord,
    fingerprint,
    flat_batch,
)
from sam_if.requirements import check_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sam_if.objective import Objective

#: How far a step may be from its record, as a part of its length, by dtype.
_FAR = {torch.float64: 1e-9, torch.float32: 1e-3}
#: Norm of a gradient below which it has no direction.
_TINY = 1e-10
_BASES = {kind.__name__: kind for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}


class RecordedRun:
    """What `Trajectory` reads; see there for its attributes."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        settings: dict[str, Any],
        folder: RunFolder | None,
        batch_of: Callable[[Sequence[int]], Any] | None,
    ) -> None:
        check_model(model)
        self.vector = ParameterVector(model, objective)
        self.objective, self.model, self._folder = objective, model, folder
        self._settings, self._batch_of = settings, batch_of
        self._kind = _BASES[settings["optimizer"]]
        self.adaptive: bool = settings["adaptive"]
        self.max_grad_norm: float | None = settings["max_grad_norm"]
        self.dynamics = dynamics_of(self._kind, settings["groups"], self.max_grad_norm)
        names = {name for group in settings["groups"] for name in group["params"]}
        if names != set(self.vector.names):
            differ = sorted(names ^ set(self.vector.names))
            remedy = "give it all of the model's trained parameters, and no others"
            raise ValueError(message("optimizer", "the model's parameters", differ[:3], remedy))
        self.records: list[StepRecord] = []
        self._final: int | None = None
        device = self.vector.read().device
        self._snapshots: Snapshots = HostSnapshots(device)
        self._kept: dict[int, list[Any]] = {}
        self._files: Batches | None = None
        if folder:
            self._snapshots = FolderSnapshots(folder.weights, device)
            self._files = Batches(folder.batches, device)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer inside of SAM: ``SGD``, ``Adam`` or ``AdamW``."""
        return self._settings["optimizer"]

    @property
    def norm_eps(self) -> float:
        """What the perturbation adds to a norm."""
        return self._settings["norm_eps"]

    @property
    def count(self) -> int:
        """Samples there are: one more than the largest number."""
        numbers = [n for record in self.records for part in record.samples for n in part]
        return 1 + max(numbers, default=-1)

    @property
    def weights(self) -> Tensor:
        """Weights behind the last step, ``(p,)``; the model's as long as the run is not finished.

        Raises:
            TrajectoryError: They cannot be made again.
        """
        if self._final is None:
            return self.vector.read()
        last = len(self)
        if last in self._snapshots.held():
            return self._snapshot(last, self._final)[WEIGHTS]
        begin = max(index for index in self._snapshots.held() if index <= last)
        return self._segment(begin, last, ended=True)[-1].weights

    def _parameters(self) -> list[nn.Parameter]:
        found = dict(self.model.named_parameters())
        return [found[name] for name in self.vector.names]

    def _moments(self, optimizer: SAM) -> dict[str, Tensor]:
        """Return the optimizer's moments, ``(p,)`` by name; nothing before its first step."""
        states = [optimizer.state.get(p, {}) for p in self._parameters()]
        found = {}
        for name in self.dynamics.moments:
            parts = [state.get(name) for state in states]
            if any(part is not None for part in parts):
                found[name] = torch.cat([
                    p.new_zeros(p.numel()) if part is None else part.detach().flatten()
                    for p, part in zip(self._parameters(), parts, strict=True)
                ])  # fmt: skip
        return found

    def _taken(self, optimizer: SAM) -> int:
        """Return how many steps the optimizer has counted."""
        counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        return max(counts, default=0)

    # --- taking steps ----------------------------------------------------------------------------

    def _shares(self, batches: Sequence[Any], record: StepRecord) -> list[float]:
        """Return how much of the loss each micro-batch is, which together is 1."""
        pairs = zip(batches, record.samples, strict=True)
        sizes = [self.vector.size(batch, len(own)) for batch, own in pairs]
        return [size / sum(sizes) for size in sizes]

    def gradients(
        self,
        optimizer: SAM,
        batches: Sequence[Any],
        record: StepRecord,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Take both gradients of a step of SAM, and leave the second at the moved weights.

        Args:
            optimizer: Whose parameters are the model's.
            batches: Micro-batches.
            record: Of the step.
            sample_weights: Of all samples, ``(n,)``; by default 1.

        Returns:
            The loss at the weights, 0-dimensional.
        """
        shares, told = self._shares(batches, record), []
        optimizer.zero_grad()
        for moved in (False, True):
            total = []
            for batch, share, own in zip(batches, shares, record.samples, strict=True):
                losses = self.objective.losses(self.model, batch)
                if sample_weights is not None:
                    losses = losses * sample_weights[list(own)]
                loss = losses.mean() if len(batches) == 1 else losses.mean() * share
                loss.backward()
                total.append(loss.detach())
            told.append(torch.stack(total).sum())
            if not moved:
                optimizer.first_step(zero_grad=True)
        return told[0]

    def _take(
        self,
        optimizer: SAM,
        batches: Sequence[Any],
        record: StepRecord,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Take a step of SAM, and return the loss before it."""
        loss = self.gradients(optimizer, batches, record, sample_weights)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm)
        optimizer.second_step(zero_grad=True)
        return loss

    def _begun(self, found: dict[str, Tensor], record: StepRecord) -> SAM:
        """Put weights into the model, and return the optimizer that steps from there."""
        self.vector.write(found[WEIGHTS])
        parameters = dict(zip(self.vector.names, self._parameters(), strict=True))
        groups = [
            {**group, "params": [parameters[name] for name in group["params"]]}
            for group in self._settings["groups"]
        ]
        optimizer = SAM(groups, self._kind, norm_eps=self._settings["norm_eps"])
        held = [name for name in self.dynamics.moments if name in found]
        parts = {name: found[name].split(self.vector.sizes) for name in held}
        of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for number, p in enumerate(parameters.values()):
            state = {name: parts[name][number].view_as(p).clone() for name in held}
            if held and self._kind is not torch.optim.SGD:
                on_device = of[p].get("fused") or of[p].get("capturable")
                place = p.device if on_device else torch.device("cpu")
                state["step"] = torch.tensor(float(record.taken), device=place)
            if held:
                optimizer.state[p] = state
        return optimizer

    # --- reading ---------------------------------------------------------------------------------

    def batches(self, index: int) -> list[Any]:
        """Return the micro-batches of a step.

        Raises:
            TrajectoryError: ``batch_of`` makes others now.
        """
        if self._batch_of is None:
            return self._files.get(index) if self._files else self._kept[index]
        record = self.records[index]
        made = [self._batch_of(samples) for samples in record.samples]
        if tuple(batch_bits(batch) for batch in made) != record.batches:
            raise TrajectoryError(
                f"step {index}: batch_of made another batch than it was trained on, of samples "
                f"{record.samples[0][:3]}...; without random augmentation, or keep batches"
            )
        return made

    def sample(self, number: int) -> tuple[Any, int]:
        """Return a batch that has a sample, and its place in it.

        Raises:
            ValueError: None has.
        """
        for index, record in enumerate(self.records):
            for part, own in enumerate(record.samples):
                if number in own:
                    return self.batches(index)[part], own.index(number)
        remedy = "they were never trained on"
        raise ValueError(message("samples", "samples of the recorded batches", number, remedy))

    def _option(self, values: Sequence[float]) -> float | Tensor:
        """Return an option of groups, by parameter where they differ."""
        if len(set(values)) == 1:
            return values[0]
        of = {
            name: value
            for group, value in zip(self._settings["groups"], values, strict=True)
            for name in group["params"]
        }
        like = self.vector.read()
        named = zip(self.vector.names, self.vector.sizes, strict=True)
        return torch.cat([like.new_full((size,), of[name]) for name, size in named])

    def _made(self, index: int, found: dict[str, Tensor], batches: list[Any]) -> Step:
        record = self.records[index]
        ends = [0, *accumulate(len(own) for own in record.samples)]
        shares = self._shares(batches, record)
        parts = [
            (batch, slice(low, high), (high - low) / share)
            for batch, (low, high), share in zip(batches, pairwise(ends), shares, strict=True)
        ]
        moments = {name: part for name, part in found.items() if name != WEIGHTS}
        samples = tuple(n for own in record.samples for n in own)
        rate, decay = self._option(record.lr), self._option(record.weight_decay)
        return Step(
            index, found[WEIGHTS], moments, parts, samples, rate, decay, record.rho, record.taken
        )

    def _snapshot(self, index: int, weights: int, moments: int | None = None) -> dict[str, Tensor]:
        """Return what was kept before a step.

        Raises:
            TrajectoryError: It is not what was put there.
        """
        found = self._snapshots.get(index)
        rest = [found[name] for name in self.dynamics.moments if name in found]
        same = fingerprint(found[WEIGHTS]) == weights
        if not same or moments not in (None, fingerprint(*rest)):
            raise TrajectoryError(f"step {index}: what was kept of it is damaged")
        return found

    def _segment(self, begin: int, end: int, *, ended: bool = False) -> list[Step]:
        """Return steps from a snapshot on, made again where they were not kept.

        Args:
            begin: Number of the first.
            end: That of the first that is not there.
            ended: Have an empty one behind the last, with the weights of the end.
        """
        found = self._snapshot(begin, self.records[begin].weights, self.records[begin].moments)
        steps = [self._made(begin, found, self.batches(begin))]
        if end - begin == 1 and not ended:
            return steps
        kept = self.vector.read()
        try:
            optimizer = self._begun(found, self.records[begin])
            for index in range(begin, end if ended else end - 1):
                self._again(optimizer, index, [batch for batch, _, _ in steps[-1].batches])
                after = {WEIGHTS: self.vector.read(), **self._moments(optimizer)}
                last = index + 1 == len(self)
                wanted = self._final if last else self.records[index + 1].weights
                if fingerprint(after[WEIGHTS]) != wanted:
                    raise TrajectoryError(
                        f"step {index}: made again, it gave other weights than were recorded; "
                        "train with Trajectory.step on the same kind of machine, with as many "
                        "threads and deterministic kernels, or keep storage='all'"
                    )
                if last:
                    steps.append(Step(index + 1, after[WEIGHTS], {}, [], (), 0.0, 0.0, 0.0, 0))
                else:
                    steps.append(self._made(index + 1, after, self.batches(index + 1)))
        finally:
            self.vector.write(kept)
        return steps

    def _again(
        self,
        optimizer: SAM,
        index: int,
        batches: Sequence[Any],
        sample_weights: Tensor | None = None,
    ) -> None:
        """Take a recorded step."""
        record = self.records[index]
        rates = zip(optimizer.param_groups, record.lr, record.weight_decay, strict=True)
        for group, rate, decay in rates:
            group.update(lr=rate, weight_decay=decay, rho=record.rho)
        with torch.enable_grad():
            self._take(optimizer, batches, record, sample_weights)

    def retrain(self, removed: Iterable[int], *, progress: bool = False) -> Tensor:
        """Make the run again without some samples, whose places in batches stay empty.

        Args:
            removed: Their numbers; none gives the run's own weights, bit for bit, if it was trained
                by `Trajectory.step`.
            progress: Show a bar.

        Returns:
            Weights at the end, ``(p,)``.

        Raises:
            TrajectoryError: Weights or batches are not those of the run.
            ValueError: A number that no recorded batch has.
        """
        numbers = sorted(set(removed))
        known = {n for record in self.records for own in record.samples for n in own}
        if unknown := [n for n in numbers if n not in known]:
            remedy = "they were never trained on"
            expected = "samples of the recorded batches"
            raise ValueError(message("removed", expected, unknown[:3], remedy))
        kept = self.vector.read()
        sample_weights = kept.new_ones(self.count)
        sample_weights[numbers] = 0
        begin = self._snapshot(0, self.records[0].weights, self.records[0].moments)
        try:
            optimizer = self._begun(begin, self.records[0])
            steps = range(len(self))
            for index in tqdm(steps, "retraining", unit="step", disable=not progress):
                given = sample_weights if numbers else None
                self._again(optimizer, index, self.batches(index), given)
            return self.vector.read()
        finally:
            self.vector.write(kept)

    def _segments(self) -> list[tuple[int, int]]:
        begins = [index for index in self._snapshots.held() if index < len(self)]
        return list(pairwise([*begins, len(self)]))

    def forwards(self) -> Iterator[Step]:
        """Return all steps, from the first to the last.

        Raises:
            TrajectoryError: One cannot be made again.
        """
        for begin, end in self._segments():
            yield from self._segment(begin, end)

    def backwards(self) -> Iterator[Step]:
        """Return all steps, from the last to the first.

        Raises:
            TrajectoryError: One cannot be made again.
        """
        segments = self._segments()
        for number in range(len(segments) - 1, -1, -1):
            found = self._segment(*segments[number])
            if number:
                self._snapshots.ahead(segments[number - 1][0])
            yield from reversed(found)

    def loss(self, step: Step) -> BatchLoss:
        """Return the loss of a step's batches."""
        return BatchLoss(self.vector, step.batches, step.weights.new_ones(len(step.samples)))

    def perturbation(self, step: Step, loss: BatchLoss) -> Perturbation:
        """Return how a step's weights were moved.

        Raises:
            TrajectoryError: By a gradient that is 0 or not finite, which has no direction.
        """
        gradient = loss.gradient(step.weights)
        found = Perturbation(step.weights, gradient, step.rho, self.adaptive, self.norm_eps)
        if step.rho and not _TINY < (norm := float(found.norm)) < math.inf:
            raise TrajectoryError(
                f"step {step.index}: the gradient that weights were moved by has norm {norm:.2g} "
                f"(samples {list(step.samples[:5])}): its direction, and what samples do to it, "
                "are noise; stop training before losses vanish, or take rho=0"
            )
        return found

    def check(self) -> float:
        """Make every step anew from its record, and return how far the worst is from it.

        What is compared is the change of the weights, and how far is a part of its length. A run
        with clipped gradients that it was not told of, with dropout, another loss, or a scheduler
        that came between ``record`` and the step is found out.

        Raises:
            TrajectoryError: A step is not what its record says.
        """
        worst, before, wanted = 0.0, None, None
        for step in self.forwards():
            if before is not None and wanted is not None:
                worst = max(worst, _apart(before, wanted, step.weights))
            loss = self.loss(step)
            at = step.weights + self.perturbation(step, loss).epsilon
            before, wanted = step, self.dynamics.forward(step, loss.gradient(at))[0]
        if before is not None and wanted is not None:
            worst = max(worst, _apart(before, wanted, self.weights))
        return worst


def _apart(step: Step, wanted: Tensor, after: Tensor) -> float:
    """Return how far weights are from where a step leads to, as a part of its length."""
    apart = torch.linalg.vector_norm(after - step.weights - wanted)
    # what rounding of the weights themselves does
    size = torch.linalg.vector_norm(wanted)
    size = size + torch.finfo(after.dtype).eps * torch.linalg.vector_norm(after)
    far = float(apart / size.clamp(min=torch.finfo(after.dtype).tiny))
    if not far <= _FAR[after.dtype]:
        raise TrajectoryError(
            f"step {step.index}: the weights did not move as recorded, but by {far:.2g} of the "
            "step otherwise; is the loss the mean of the batch's losses, are gradients "
            "clipped (max_grad_norm), or was record called before a schedule's step?"
        )
    return far


def batch_bits(batch: Any) -> int:
    """Return the `fingerprint` of a batch."""
    return fingerprint(*flat_batch(batch).values())
