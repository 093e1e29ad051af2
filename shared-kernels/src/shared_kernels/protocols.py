"""Duck types that the parts of the house, and the packages on top, meet through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import torch

    from shared_kernels.offload.store import UnitBuffer

__all__ = ["Materializer"]


@runtime_checkable
class Materializer(Protocol):
    """Turns a unit's stored bytes into the weights a visit computes with.

    A *variant* is whatever tells one set of weights from another (a sign and a direction, say);
    ``None`` is the weights as they are. All work is queued on the current stream.
    """

    def parts(self, unit: int, *, training: bool) -> tuple[str, ...]:
        """Name the streams ("main", "lo") a visit of ``unit`` needs on the device."""
        ...

    def groups(self, variants: Sequence[Hashable]) -> list[list[Hashable]]:
        """Split the variants wanted into groups whose weights can exist at the same time."""
        ...

    def materialize(
        self, unit: int, buffer: UnitBuffer, group: Sequence[Hashable], *, training: bool
    ) -> tuple[dict[Hashable, list[torch.Tensor]], tuple[str, ...]]:
        """Make the weights of a group.

        Returns:
            For each variant the trainable parameters in run order, and the names of the streams
            of ``buffer`` that were changed and must be written home.
        """
        ...

    def resident(
        self, unit: int, buffer: UnitBuffer, variant: Hashable, *, training: bool
    ) -> list[torch.Tensor]:
        """Make, or recall, the weights of the parameters outside the blocks for one variant."""
        ...

    def fold(self, unit: int, buffer: UnitBuffer) -> tuple[str, ...]:
        """Bring the stored bytes up to date; returns the streams changed."""
        ...
