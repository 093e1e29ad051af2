"""Weights as if samples had not been trained on: approximate unlearning, with what is left to do.

Without samples S the field is ``G_-S``: their weights are 0, and what sums are divided by stays.
Its fixed point is where training without them would come to rest, and ``|G_-S|`` tells how far
weights are from it. ``first_order`` moves them by ``C^-1 sum_S a_i dG / da_i`` with the Jacobian C
of all data. ``newton`` takes steps ``-C_-S^-1 G_-S``, whose perturbations, Hessians and Jacobian
are of the data that are left and of the weights where each step begins; a step is halved until the
residual falls, as a whole one may go too far where the perturbation moves much with the weights.
``replay`` makes a recorded run again without the samples, which is exact, and takes as long.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message
from shared_kernels.checkpoint import TensorInfo, replacing_folder, write_safetensors
from shared_kernels.files import write_text
from torch import Tensor

from sam_if.attribution import field_of
from sam_if.errors import ConvergenceError
from sam_if.hessian_influence import RESTLESS, checked_samples, warnings_of_rest
from sam_if.run import RecordedRun
from sam_if.solvers import LinearSystem, warnings_of_systems

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from sam_if.field import SAMField
    from sam_if.objective import ParameterVector

METHODS = ("first_order", "newton", "replay")
_FORMAT, _VERSION = "sam-if-edit", 1
_TENSORS, _RECORD = "weights.safetensors", "certificate.json"
_KIND, _EXACT = "approximate unlearning", "training again"
#: Of a step, at most; and the part of what a linear field would fall that is enough.
_HALVINGS, _ENOUGH = 30, 1e-4


@dataclass(frozen=True)
class Certificate:
    """How near edited weights are to a fixed point of SAM without the samples.

    It is of the field's equation alone. That nothing of the samples can be found in the weights is
    another thing, which it does not say.

    Attributes:
        method: ``first_order``, ``newton`` or ``replay``, which has nothing of what follows.
        samples: That were removed.
        residuals: ``|G_-S|`` of the weights as they were, and behind each step.
        lengths: Of Newton's steps, as a part of whole ones.
        stationarity_before: ``|G_-S|`` as a part of its terms, see `SAMField.stationarity`.
        stationarity_after: The same of the edited weights.
        solver_residuals: Of each linear system, ``|A x - b| / |b|``; empty with ``ekfac``.
        distance_estimate: ``|C_-S^-1 G_-S|`` at the edited weights: Newton's next step, which is
            about as long as the way that is left, but bounds nothing. None if it was not asked for
            or not found, and with ``ekfac``.
        warnings: What speaks against the edit.
    """

    method: str
    samples: tuple[int, ...]
    residuals: list[float]
    lengths: list[float]
    stationarity_before: float | None
    stationarity_after: float | None
    solver_residuals: list[float]
    distance_estimate: float | None
    warnings: list[str] = field(default_factory=list)

    @property
    def residual_before(self) -> float:
        """``|G_-S|`` of the weights as they were."""
        return self.residuals[0]

    @property
    def residual_after(self) -> float:
        """``|G_-S|`` of the edited weights."""
        return self.residuals[-1]

    @property
    def reliable(self) -> bool:
        """Whether there is no warning."""
        return not self.warnings

    def __str__(self) -> str:
        if self.method == "replay":
            return f"{_EXACT} without {len(self.samples)} samples ({self.method})"
        left = "" if self.distance_estimate is None else (
            f", about {self.distance_estimate:.2g} from the fixed point (an estimate)"
        )  # fmt: skip
        return (
            f"{_KIND} of {len(self.samples)} samples ({self.method}): residual "
            f"{self.residual_before:.2g} -> {self.residual_after:.2g}{left}"
            + "".join(f"\nwarning: {text}" for text in self.warnings)
        )


@dataclass(frozen=True, eq=False)
class Edited:
    """Weights from which samples were removed.

    Attributes:
        parameters: By name, in the model's order; those that were not trained are not among them.
        certificate: How near they are to what training without the samples would give.
    """

    parameters: dict[str, Tensor]
    certificate: Certificate

    @property
    def weights(self) -> Tensor:
        """All of them, ``(p,)``, as in `SAMField`."""
        return torch.cat([part.flatten() for part in self.parameters.values()])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters for ``model.load_state_dict(..., strict=False)``."""
        return dict(self.parameters)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put them into a model, rounded to its dtype.

        Raises:
            ValueError: It has no such parameters; it is left as it was.
        """
        found = dict(model.named_parameters())
        for name, wanted in self.parameters.items():
            if name not in found or found[name].shape != wanted.shape:
                got = tuple(found[name].shape) if name in found else sorted(found)[:3]
                remedy = "give the model that the field was made of, or one like it"
                raise ValueError(message("model", f"{name} {tuple(wanted.shape)}", got, remedy))
        for name, wanted in self.parameters.items():
            found[name].copy_(wanted)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new folder of safetensors and JSON, which appears when it is complete.

        Raises:
            FileExistsError: The folder exists and is not empty.
        """
        values = {n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}
        record: dict[str, Any] = {
            "format": _FORMAT, "version": _VERSION,
            "kind": _EXACT if self.certificate.method == "replay" else _KIND,
            "parameters": list(values), "certificate": asdict(self.certificate),
        }  # fmt: skip
        with replacing_folder(folder) as new:
            infos = [TensorInfo(n, p.dtype, tuple(p.shape)) for n, p in values.items()]
            write_safetensors(new / _TENSORS, infos, values.values())
            write_text(new / _RECORD, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Edited:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: It is no edit, or of another version.
        """
        from safetensors.torch import load_file

        record = json.loads((Path(folder) / _RECORD).read_text(encoding="utf-8"))
        found = (record.get("format"), record.get("version"))
        if found != (_FORMAT, _VERSION):
            remedy = "made by another program or version"
            raise ValueError(message("folder", f"{_FORMAT} {_VERSION}", found, remedy))
        values, told = load_file(Path(folder) / _TENSORS), record["certificate"]
        told["samples"] = tuple(told["samples"])
        return cls({name: values[name] for name in record["parameters"]}, Certificate(**told))


def remove(
    source: SAMField | RecordedRun,
    samples: Iterable[int],
    method: str = "newton",
    solver: str = "auto",
    *,
    steps: int = 3,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    estimate: bool = True,
    progress: bool = False,
) -> Edited:
    """Return the weights as if samples had not been there, approximately.

    The model stays as it is: `Edited.apply` changes it.

    Args:
        source: The field at the trained weights, of the training data; or a recorded run, whose
            field at its end is taken if it has one.
        samples: Their numbers, in the order of the training data.
        method: ``newton``, which is nearer, or ``first_order``, whose linear system is of all data;
            or ``replay``, of a run.
        solver: As in `HessianInfluence`; a dense one makes a matrix for each step, and ``ekfac``
            leads down, too, but in more steps.
        steps: Of Newton's, at most. They end where none lowers the residual any more.
        damping: Added to the Jacobian's diagonal.
        tolerance: Of iterative solvers, relative to the right-hand side.
        max_iterations: Of theirs.
        estimate: Solve one more system, for the certificate's distance.
        progress: Show a bar while a run is made again.

    Raises:
        TrajectoryError: The run cannot be made again, or has no closed form.
        ConvergenceError: A linear system is singular, or was not solved.
        ValueError: Samples that are not there, are there twice or are all there are, or an option
            out of range.
    """
    check_choice("method", method, METHODS)
    check_range("steps", steps, 1, 1 << 31, "three are enough where the field is near linear")
    given = list(samples)
    if method == "replay":
        return _replayed(source, given, progress)
    field, numbers = _field_and_places(source, given)
    numbers = _present(field, numbers)
    kept = field.sample_weights.clone()
    kept[numbers] = 0
    if not kept.any():
        remedy = "training on nothing has no fixed point but that of the decay"
        raise ValueError(message("samples", "some to be left", f"all {field.count}", remedy))
    options: dict[str, Any] = {
        "damping": damping, "tolerance": tolerance, "max_iterations": max_iterations
    }  # fmt: skip
    begin = _at(field, field.weights, kept)
    if method == "first_order":
        system = LinearSystem(field, solver, **options)
        change, left = system.solve(field.source(field.sample_weights - kept))
        after = _at(field, field.weights + change, kept)
        residuals, lengths, solved = [_size(begin), _size(after)], [], [left]
    else:
        after, residuals, lengths, solved = _newton(begin, steps, solver, options)
    told = warnings_of_rest(field.stationarity()) + warnings_of_systems(solved, tolerance)
    told += _complaints(after, residuals, method == "newton" and len(lengths) < steps)
    distance = None
    if solver == "ekfac":
        # of another system than the field's
        solved = []
    elif estimate:
        try:
            change, left = LinearSystem(after, solver, **options).solve(after.residual())
            distance, solved = float(torch.linalg.vector_norm(change)), [*solved, left]
        except ConvergenceError as error:
            told.append(f"no estimate of the distance: {error}")
    for text in told:
        warnings.warn(text, stacklevel=2)
    certificate = Certificate(
        method, tuple(given), residuals, lengths, begin.stationarity(),
        after.stationarity(), solved, distance, told,
    )  # fmt: skip
    return Edited(_named(field.vector, after.weights), certificate)


def _replayed(source: SAMField | RecordedRun, samples: list[int], progress: bool) -> Edited:
    """Return the weights of a run that is made again."""
    if not isinstance(source, RecordedRun):
        remedy = "a field knows no steps: give the run, or take method='newton'"
        raise ValueError(message("source", "a recorded run", type(source).__name__, remedy))
    if not samples:
        raise ValueError(message("samples", "at least one", samples, "say which to remove"))
    weights = source.retrain(checked_samples(samples, source.count), progress=progress)
    certificate = Certificate("replay", tuple(samples), [], [], None, None, [], None)
    return Edited(_named(source.vector, weights), certificate)


def _field_and_places(
    source: SAMField | RecordedRun, samples: list[int]
) -> tuple[SAMField, list[int]]:
    """Return a field, and where samples are in its order."""
    if not isinstance(source, RecordedRun):
        return source, samples
    field, numbers = field_of(source)
    places = {number: place for place, number in enumerate(numbers.tolist())}
    if unknown := [n for n in samples if n not in places]:
        remedy = "they were never trained on"
        expected = "samples of the recorded batches"
        raise ValueError(message("samples", expected, unknown[:3], remedy))
    return field, [places[n] for n in samples]


def _complaints(edited: SAMField, residuals: list[float], stopped: bool) -> list[str]:
    """Return what speaks against an edit, whose search may have stopped before its time."""
    reached = edited.stationarity()
    if residuals[-1] > residuals[0]:
        return [
            f"the edited weights have a larger residual than before, {residuals[-1]:.2g} instead "
            f"of {residuals[0]:.2g}; take fewer samples at a time, or method='newton'"
        ]
    if stopped and not _rests(edited):
        return [
            f"no step along Newton's direction lowers the residual, with stationarity at "
            f"{reached:.2g}; give less damping or a smaller tolerance, or train again"
        ]
    if reached > RESTLESS:
        return [
            f"the edited weights are at no fixed point without the samples: stationarity is "
            f"{reached:.2g}; take more steps, or fewer samples at a time"
        ]
    return []


def _present(field: SAMField, samples: Iterable[int]) -> list[int]:
    """Return the numbers of samples that can be removed."""
    numbers = checked_samples(samples, field.count)
    if not numbers:
        raise ValueError(message("samples", "at least one", numbers, "say which to remove"))
    if gone := [n for n in numbers if not field.sample_weights[n]]:
        remedy = "the field's sample_weights of these are 0 already"
        raise ValueError(message("samples", "some that are there", gone[:3], remedy))
    return numbers


def _newton(
    at: SAMField, steps: int, solver: str, options: dict[str, Any]
) -> tuple[SAMField, list[float], list[float], list[float]]:
    """Return the field behind the last step, residuals, lengths of steps, and those of systems."""
    residuals, lengths, solved = [_size(at)], [], []
    while len(lengths) < steps and not _rests(at):
        change, left = LinearSystem(at, solver, **options).solve(-at.residual())
        solved.append(left)
        for halved in range(_HALVINGS):
            length = 0.5**halved
            tried = _at(at, at.weights + length * change, at.sample_weights)
            size = _size(tried)
            if size < (1 - _ENOUGH * length) * residuals[-1]:
                break
        else:
            break
        at = tried
        residuals.append(size)
        lengths.append(length)
    return at, residuals, lengths, solved


def _at(field: SAMField, weights: Tensor, sample_weights: Tensor) -> SAMField:
    """Return the same field at other weights, and with others of samples."""
    found = copy.copy(field)
    found.weights, found.sample_weights = weights, sample_weights
    found.groups = [copy.copy(group) for group in field.groups]
    for group in found.groups:
        group.sample_weights = sample_weights
    found._perturbations = found._maximisers = None
    return found


def _rests(field: SAMField) -> bool:
    """Whether the residual is of the size of what rounding leaves."""
    return field.stationarity() <= torch.finfo(field.weights.dtype).eps ** 0.75


def _size(field: SAMField) -> float:
    return float(torch.linalg.vector_norm(field.residual()))


def _named(vector: ParameterVector, weights: Tensor) -> dict[str, Tensor]:
    """Return weights by parameter."""
    parts = weights.split(vector.sizes)
    return {
        name: part.view(shape)
        for name, part, shape in zip(vector.names, parts, vector.shapes, strict=True)
    }
