"""What a flat buffer holds: segments (parameters) padded to tiles of 4096 elements."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared_kernels._checks import check_range
from shared_kernels.random.constants import MAX_DIRECTION
from shared_kernels.random.constants import TILE as TILE

#: Columns of a tile table.
UID, START_LOW, START_HIGH, VALID, FLAGS = range(5)
DECAY_FLAG: Final = 1


class Segment(NamedTuple):
    """A parameter, or a slice of one, in a flat buffer.

    Attributes:
        uid: Identifier of the noise stream, `shared_kernels.random.param_uid` of the name.
        numel: Number of elements here.
        decay: Whether the weight-decay factor of the records applies.
        start: Index of the first element in the whole parameter, a multiple of 4096.
    """

    uid: int
    numel: int
    decay: bool
    start: int = 0


class Perturbation(NamedTuple):
    """One probe direction.

    Attributes:
        seed: 64-bit step seed.
        direction: Index of the direction in [0, 2^24).
        eps: Scale of the perturbation, rounded to float32.
    """

    seed: int
    direction: int
    eps: float


def padded_numel(numel: int) -> int:
    """Return ``numel`` rounded up to whole tiles."""
    return -(-numel // TILE) * TILE


def build_tile_table(segments: Sequence[Segment], device: torch.device | str = "cpu") -> Tensor:
    """Describe the tiles of a flat buffer that holds ``segments`` one after the other.

    Each segment begins at a multiple of 4096 elements; the buffer has ``4096 * tiles`` elements.

    Args:
        segments: What the buffer holds, in order. Empty segments take no tile.
        device: Where to create the table.

    Returns:
        int32 ``(tiles, 5)``: uid bits, logical start (low and high 32 bits), number of valid
        elements, flags (bit 0: weight decay applies).

    Raises:
        ValueError: A uid, size or start is out of range, or a start is not a multiple of 4096.
    """
    rows = [np.empty((0, 5), np.int64)]
    for index, segment in enumerate(segments):
        name = f"segments[{index}]"
        check_range(f"{name}.uid", segment.uid, 0, 1 << 32, "use param_uid(name)")
        check_range(f"{name}.numel", segment.numel, 0, 1 << 62, "pass the element count")
        check_range(f"{name}.start", segment.start, 0, 1 << 62, "pass an element index")
        if segment.start % TILE:
            raise ValueError(
                f"{name}.start: expected a multiple of {TILE}, got {segment.start}; "
                "cut slices at tile boundaries"
            )
        offset = np.arange(0, segment.numel, TILE, dtype=np.int64)
        start = segment.start + offset
        row = np.empty((len(offset), 5), np.int64)
        row[:, UID] = segment.uid
        row[:, START_LOW] = start & 0xFFFFFFFF
        row[:, START_HIGH] = start >> 32
        row[:, VALID] = np.minimum(segment.numel - offset, TILE)
        row[:, FLAGS] = DECAY_FLAG if segment.decay else 0
        rows.append(row)
    table = np.concatenate(rows).astype(np.uint32).view(np.int32)
    return torch.from_numpy(table).to(device)


def check_perturbation(perturb: Perturbation) -> None:
    """Check the direction and the scale of a perturbation.

    Raises:
        ValueError: The direction is out of range, or eps is not finite in float32.
    """
    check_range("perturb.direction", perturb.direction, 0, MAX_DIRECTION, "number them from 0")
    if not abs(perturb.eps) <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"perturb.eps: expected a finite float32, got {perturb.eps!r}; use for example 1e-3"
        )
