"""The Gaussian of a step: one secure draw per coordinate, the same at any world size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from shared_kernels.ops.dp import gaussian_steps
from shared_kernels.random.chacha import key_from_seed, new_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

__all__ = ["ClippedSum", "NoiseSource"]

_GRADIENTS, _COUNTS = 0, 1
#: Elements noised in one launch: totals and results are in memory together.
_TOGETHER = 1 << 28


@dataclass(frozen=True, eq=False)
class ClippedSum:
    """A sum that waits for its noise.

    Attributes:
        total: Sum of a parameter, or a part of it that is contiguous in it.
        uid: Number of the parameter.
        std: Standard deviation of the noise.
        dtype: Of the result.
        start: Index in the parameter of the part's first element.
    """

    total: Tensor
    uid: int
    std: float
    dtype: torch.dtype = torch.float32
    start: int = 0


class NoiseSource:
    """Noise as a pure function of (key, step, parameter, element).

    The key never leaves the process (with several ranks: the process group) and is in no
    checkpoint. A resumed run draws a fresh one, so that no noise is ever used twice.
    """

    def __init__(self, *, secure: bool = True, seed: int | None = None) -> None:
        """Draw the key.

        Args:
            secure: Take it from the operating system's cryptographic generator.
            seed: Instead, derive it from this number: repeatable, and not private.

        Raises:
            ValueError: A seed is given for a secure source, or none for another.
        """
        if secure and seed is not None:
            raise ValueError(
                f"seed={seed} makes the noise predictable: leave it out, or say secure_rng=False "
                "for runs that are not to be released"
            )
        if not secure and seed is None:
            raise ValueError("secure_rng=False needs a seed")
        self.secure = secure
        self._key = new_key() if seed is None else key_from_seed(seed)

    def agree(self) -> None:
        """Give all ranks the first one's key."""
        distributed = torch.distributed
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        key = self._key.to(device)
        distributed.broadcast(key, 0)
        self._key = key.cpu()

    def noised(
        self, sums: Iterable[ClippedSum], *, step: int, divisor: float, counts: bool = False
    ) -> Iterator[Tensor]:
        """Yield (total + noise) / divisor of each sum; totals are used up.

        Sums are taken from the iterable, and noised together, until they hold 2^28 elements.

        Args:
            sums: All on one device.
            step: Number of the step.
            divisor: Public batch size.
            counts: Whether these are counts of units, whose noise is another.
        """
        together: list[ClippedSum] = []
        for clipped in sums:
            if together and sum(s.total.numel() for s in (*together, clipped)) > _TOGETHER:
                yield from self._noised(together, step, divisor, counts)
                together = []
            together.append(clipped)
        if together:
            yield from self._noised(together, step, divisor, counts)

    def _noised(
        self, sums: list[ClippedSum], step: int, divisor: float, counts: bool
    ) -> list[Tensor]:
        outs = [
            s.total if s.total.dtype is s.dtype else torch.empty_like(s.total, dtype=s.dtype)
            for s in sums
        ]
        gaussian_steps(
            [s.total.view(-1) for s in sums],
            [out.view(-1) for out in outs],
            key=self._key,
            step=step,
            uids=[s.uid for s in sums],
            stds=[s.std for s in sums],
            divisor=divisor,
            starts=[s.start for s in sums],
            domain=_COUNTS if counts else _GRADIENTS,
        )
        sums.clear()
        return outs
