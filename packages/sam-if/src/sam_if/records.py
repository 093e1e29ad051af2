"""What is kept of a run: a line for each step, and weights and moments of some."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from shared_kernels._checks import message
from shared_kernels.files import write_bytes, write_text
from shared_kernels.offload import HostBuffer, make_transfer
from torch import Tensor

from sam_if.errors import TrajectoryError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shared_kernels.offload.transfer import Token

_FORMAT, _VERSION = "sam-if-trajectory", 1
_RUN, _STEPS, _WEIGHTS, _BATCHES = "run.json", "steps.jsonl", "weights", "batches"
#: Name of the weights in a snapshot, beside the moments.
WEIGHTS = "weights"
#: Snapshots that may be on their way to the disk at a time.
_IN_FLIGHT = 2


def fingerprint(*tensors: Tensor) -> int:
    """Return 64 bits of the bits of tensors, which differ where one number differs.

    They are ``torch.hash_tensor`` of each, so that nothing is copied to the host, and tell that a
    run was not repeated, not that somebody meant to deceive.
    """
    found = 0
    for tensor in tensors:
        part = torch.hash_tensor(tensor.detach()).view(torch.int64)
        # the order of tensors counts
        found = (found * 1_000_003 + int(part)) % (1 << 64)
    return found


@dataclass(frozen=True)
class StepRecord:
    """What is always kept of a step.

    Attributes:
        samples: Numbers of the samples among the training data, of each micro-batch.
        lr: Rate of learning of each group of parameters.
        weight_decay: The same.
        rho: Radius of the neighbourhood.
        taken: Steps that the optimizer's moments have seen before.
        weights: `fingerprint` of the weights before it.
        moments: Of the optimizer's moments before it.
        batches: Of each micro-batch; empty where batches themselves are kept.
    """

    samples: tuple[tuple[int, ...], ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    rho: float
    taken: int
    weights: int
    moments: int
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """A step of SAM, as it was begun.

    Attributes:
        index: Its number in the record.
        weights: ``(p,)`` before it.
        moments: Of the optimizer before it, ``(p,)`` by name; empty before its first step.
        batches: Micro-batches that its gradients are of, each with the places of its samples among
            ``samples`` and what the sum of its losses is divided by.
        samples: Numbers of the samples among the training data.
        lr: Rate of learning; ``(p,)`` where groups of parameters differ.
        weight_decay: The same.
        rho: Radius of the neighbourhood.
        taken: Steps that the moments have seen before.
    """

    index: int
    weights: Tensor
    moments: dict[str, Tensor]
    batches: list[tuple[Any, slice, float]]
    samples: tuple[int, ...]
    lr: float | Tensor
    weight_decay: float | Tensor
    rho: float
    taken: int


class Snapshots(Protocol):
    """Weights and moments of some steps."""

    def put(self, index: int, parts: dict[str, Tensor]) -> None:
        """Keep tensors ``(p,)`` that nobody changes."""
        ...

    def get(self, index: int) -> dict[str, Tensor]:
        """Return them, on the device."""
        ...

    def ahead(self, index: int) -> None:
        """Say which will be asked for next."""
        ...

    def drop(self, index: int) -> None:
        """Forget some."""
        ...

    def held(self) -> list[int]:
        """Return which are there, in order."""
        ...


class HostSnapshots:
    """In host memory, page-locked where there is a GPU, which copies while it computes.

    Args:
        device: That the tensors come from and go to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[int, tuple[HostBuffer | None, dict[str, Tensor]]] = {}
        self._transfer = make_transfer(device, registered=True)
        self._flying: list[tuple[Token, list[Tensor]]] = []
        self._ahead: dict[int, tuple[Token, dict[str, Tensor]]] = {}

    def held(self) -> list[int]:
        """Return which are there, in order."""
        return sorted(self._kept)

    def put(self, index: int, parts: dict[str, Tensor]) -> None:
        """Keep tensors, without waiting for their copies."""
        if self._device.type != "cuda":
            self._kept[index] = (None, parts)
            return
        buffer = HostBuffer(sum(part.nbytes for part in parts.values()), pin="register")
        begin, views = 0, {}
        after = [self._transfer.mark()]
        for name, part in parts.items():
            place = buffer.tensor[begin : begin + part.nbytes]
            views[name] = place.view(part.dtype)
            token = self._transfer.download(part, views[name], after)
            begin += part.nbytes
            # what is being copied is not freed before
            self._flying.append((token, [part]))
        while len(self._flying) > _IN_FLIGHT * len(parts):
            self._flying.pop(0)[0].synchronize()
        self._kept[index] = (buffer, views)

    def _upload(self, index: int) -> tuple[Token, dict[str, Tensor]]:
        while self._flying:
            self._flying.pop(0)[0].synchronize()
        views = self._kept[index][1]
        found = {name: torch.empty_like(view, device=self._device) for name, view in views.items()}
        after = [self._transfer.mark()]
        token = after[0]
        for name, view in views.items():
            token = self._transfer.upload(view, found[name], after)
        return token, found

    def get(self, index: int) -> dict[str, Tensor]:
        """Return tensors on the device; the current stream waits for them."""
        if self._device.type != "cuda":
            return dict(self._kept[index][1])
        token, found = self._ahead.pop(index, None) or self._upload(index)
        token.wait()
        return found

    def ahead(self, index: int) -> None:
        """Begin to copy some to the device."""
        if self._device.type == "cuda" and index not in self._ahead:
            self._ahead[index] = self._upload(index)

    def drop(self, index: int) -> None:
        """Forget some."""
        self._transfer.synchronize()
        self._ahead.pop(index, None)
        del self._kept[index]


class FolderSnapshots:
    """In files of safetensors, which are written and read ahead by a thread.

    Args:
        folder: Theirs.
        device: That the tensors come from and go to.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self._held = {int(file.stem) for file in folder.glob("*.safetensors")}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sam-if")
        self._writing: list[Future[None]] = []
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:08d}.safetensors"

    def held(self) -> list[int]:
        """Return which are there, in order."""
        return sorted(self._held)

    def put(self, index: int, parts: dict[str, Tensor]) -> None:
        """Write a file, in its turn.

        Raises:
            OSError: An earlier one could not be written.
        """
        host = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
        self._writing.append(self._thread.submit(_write, self._file(index), host))
        self._held.add(index)
        while len(self._writing) > _IN_FLIGHT:
            self._writing.pop(0).result()

    def wait(self) -> None:
        """Return when all is on the disk.

        Raises:
            OSError: Something could not be written.
        """
        while self._writing:
            self._writing.pop(0).result()

    def get(self, index: int) -> dict[str, Tensor]:
        """Return tensors on the device."""
        self.wait()
        reading = self._ahead.pop(index, None)
        found = reading.result() if reading else _read(self._file(index))
        return {name: part.to(self._device) for name, part in found.items()}

    def ahead(self, index: int) -> None:
        """Begin to read some."""
        self.wait()
        if index not in self._ahead:
            self._ahead[index] = self._thread.submit(_read, self._file(index))

    def drop(self, index: int) -> None:
        """Remove a file."""
        self.wait()
        self._ahead.pop(index, None)
        self._file(index).unlink()
        self._held.discard(index)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    write_bytes(path, save(tensors))


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{path} cannot be read: {error}") from error


# --- batches -------------------------------------------------------------------------------------


def flat_batch(batch: Any) -> dict[str, Tensor]:
    """Return the tensors of a batch by name: of a mapping, or of a sequence by number.

    Raises:
        ValueError: A batch of something else.
    """
    if hasattr(batch, "items"):
        found = {str(name): part for name, part in batch.items()}
    elif isinstance(batch, (tuple, list)):
        found = {str(number): part for number, part in enumerate(batch)}
    else:
        found = {"": batch}
    wrong = [type(part).__name__ for part in found.values() if not isinstance(part, Tensor)]
    if wrong or "" in found:
        got = wrong[0] if wrong else type(batch).__name__
        remedy = "or give batch_of, which makes batches of the numbers of samples"
        raise ValueError(message("batch", "a mapping or pair of tensors", got, remedy))
    return found


class Batches:
    """Micro-batches of steps in files, one for each step.

    Args:
        folder: Theirs.
        device: That they go to.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:08d}.safetensors"

    def put(self, index: int, batches: Sequence[Any]) -> None:
        """Write those of a step."""
        parts = {}
        for number, batch in enumerate(batches):
            kind = "mapping" if hasattr(batch, "items") else "sequence"
            for name, part in flat_batch(batch).items():
                parts[f"{number}/{kind}/{name}"] = part.detach().cpu().contiguous().clone()
        _write(self._file(index), parts)

    def get(self, index: int) -> list[Any]:
        """Read those of a step."""
        found: dict[int, dict[str, Tensor]] = {}
        kinds = {}
        for place, part in _read(self._file(index)).items():
            number, kind, name = place.split("/", 2)
            found.setdefault(int(number), {})[name] = part.to(self._device)
            kinds[int(number)] = kind
        return [
            found[n] if kinds[n] == "mapping"
            else tuple(found[n][name] for name in sorted(found[n], key=int))
            for n in sorted(found)
        ]  # fmt: skip

    def drop(self, index: int) -> None:
        """Remove those of a step."""
        self._file(index).unlink(missing_ok=True)


# --- folders -------------------------------------------------------------------------------------


class RunFolder:
    """A run's files.

    Args:
        path: The folder.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lines: Any = None

    @property
    def weights(self) -> Path:
        """Folder of snapshots."""
        return self.path / _WEIGHTS

    @property
    def batches(self) -> Path:
        """Folder of batches."""
        return self.path / _BATCHES

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what is known before the first step.

        Raises:
            FileExistsError: There is something in the folder.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} exists and is not empty; choose another folder, or go on with "
                "Trajectory.resume"
            )
        self._settle(settings)
        (self.path / _STEPS).touch()

    def _settle(self, settings: Mapping[str, Any]) -> None:
        record = {"format": _FORMAT, "version": _VERSION, **settings}
        write_text(self.path / _RUN, json.dumps(record, indent=1) + "\n")

    def read(self) -> tuple[dict[str, Any], list[StepRecord]]:
        """Return what is known of the run, and its steps.

        A last line that was not written to its end is not there.

        Raises:
            FileNotFoundError: It is no run's folder.
            ValueError: It is another program's or version's, or a line is none.
        """
        record = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        found = (record.get("format"), record.get("version"))
        if found != (_FORMAT, _VERSION):
            remedy = "made by another program or version"
            raise ValueError(message("folder", f"{_FORMAT} {_VERSION}", found, remedy))
        lines = (self.path / _STEPS).read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        steps = []
        for number, line in enumerate(lines):
            try:
                given = json.loads(line)
                given["samples"] = tuple(tuple(part) for part in given["samples"])
                for name in ("lr", "weight_decay", "batches"):
                    given[name] = tuple(given[name])
                steps.append(StepRecord(**given))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path / _STEPS}, line {number + 1}: {error}") from error
        return record, steps

    def append(self, step: StepRecord) -> None:
        """Add a line."""
        if self._lines is None:
            self._lines = (self.path / _STEPS).open("a", encoding="utf-8")
        self._lines.write(json.dumps(asdict(step)) + "\n")
        self._lines.flush()

    def cut(self, steps: Sequence[StepRecord]) -> None:
        """Have only these steps."""
        self._lines = None
        text = "".join(json.dumps(asdict(step)) + "\n" for step in steps)
        write_text(self.path / _STEPS, text)

    def finish(self, settings: Mapping[str, Any]) -> None:
        """Put all lines on the disk, and write what is known now."""
        if self._lines is not None:
            os.fsync(self._lines.fileno())
            self._lines.close()
            self._lines = None
        self._settle(settings)
