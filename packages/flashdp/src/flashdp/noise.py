"""The Gaussian of a step: one secure draw per coordinate, the same at any world size."""

from __future__ import annotations

import torch
from shared_kernels.ops.dp import gaussian_step
from shared_kernels.random.chacha import key_from_seed, new_key
from torch import Tensor

__all__ = ["NoiseSource"]

_GRADIENTS, _COUNTS = 0, 1


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
        self,
        total: Tensor,
        *,
        step: int,
        uid: int,
        std: float,
        divisor: float,
        dtype: torch.dtype,
        start: int = 0,
        counts: bool = False,
    ) -> Tensor:
        """Return (total + noise) / divisor in ``dtype``; ``total`` is used up.

        Args:
            total: Sum of a parameter, or a part of it that is contiguous in it.
            step: Number of the step.
            uid: Number of the parameter.
            std: Standard deviation of the noise.
            divisor: Public batch size.
            dtype: Of the result.
            start: Index in the parameter of the part's first element.
            counts: Whether these are counts of units, whose noise is another.
        """
        out = total if total.dtype is dtype else torch.empty_like(total, dtype=dtype)
        gaussian_step(
            total.view(-1),
            out.view(-1),
            key=self._key,
            step=step,
            uid=uid,
            std=std,
            divisor=divisor,
            start=start,
            domain=_COUNTS if counts else _GRADIENTS,
        )
        return out
