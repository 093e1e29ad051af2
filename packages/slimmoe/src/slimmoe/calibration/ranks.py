"""Calibration by a group of processes, each of which runs a part of the batches."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from shared_kernels._checks import message
from torch import distributed

from slimmoe.calibration.data import hash_tokens
from slimmoe.calibration.statistics import hexadecimal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from slimmoe.calibration.data import Batch
    from slimmoe.calibration.statistics import CalibrationStatistics, Sums

_T = TypeVar("_T")


class Ranks:
    """The processes of the default group of ``torch.distributed``, or one alone.

    Args:
        together: Whether a group is looked for.

    Attributes:
        index: Of this process.
        count: Of all of them.
    """

    def __init__(self, together: bool) -> None:
        there = together and distributed.is_available() and distributed.is_initialized()
        self.index = distributed.get_rank() if there else 0
        self.count = distributed.get_world_size() if there else 1

    def share(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches that this process runs.

        Raises:
            ValueError: Others have other batches, or there are fewer of them than processes.
        """
        if self.count == 1:
            return batches
        told = self._gathered((len(batches), hash_tokens(batches)))
        if len(set(told)) > 1:
            remedy = "each takes its own part of it"
            raise ValueError(message("data", "the same in all processes", told, remedy))
        if len(batches) < self.count:
            remedy = "give more data, or smaller batch_tokens"
            wanted = f"at least {self.count} batches, one for each process"
            raise ValueError(message("data", wanted, len(batches), remedy))
        return batches[self.index :: self.count]

    def agreed(self, call: Callable[[], _T]) -> _T:
        """Return what a call gives; if it fails in one process, it does in all.

        Raises:
            RuntimeError: It failed in another process.
        """
        if self.count == 1:
            return call()
        try:
            found = call()
        except Exception as error:
            self._gathered(str(error))
            raise
        for rank, said in enumerate(self._gathered(None)):
            if said is not None:
                raise RuntimeError(f"process {rank}: {said}")
        return found

    def summed(self, found: CalibrationStatistics) -> CalibrationStatistics:
        """Return the statistics of all processes, the same in each."""
        if self.count == 1:
            return found
        told = self._gathered([part.tokens for _, part in found.parts()])
        tokens = iter([sum(counts) for counts in zip(*told, strict=True)])
        whole = found.each(
            lambda part: dataclasses.replace(part, tokens=next(tokens), **_reduced(part))
        )
        names = ("tokens", "sequences", "batches")
        told = self._gathered([*(getattr(found, n) for n in names), int(found.tokens_sha256, 16)])
        sums = [sum(numbers) for numbers in zip(*told, strict=True)]
        return dataclasses.replace(
            whole, **dict(zip(names, sums, strict=False)), tokens_sha256=hexadecimal(sums[-1])
        )

    def _gathered(self, value: Any) -> Sequence[Any]:
        """Return what each process has, in their order."""
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found


def _reduced(part: Sums) -> dict[str, Tensor]:
    """Return tensors summed up over processes, or their maxima."""
    device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    found = {}
    for name, tensor in part.tensors().items():
        here = tensor.to(device, copy=True)
        operation = distributed.ReduceOp.MAX if name in part.maxima() else distributed.ReduceOp.SUM
        distributed.all_reduce(here, operation)
        found[name] = here.cpu()
    return found
