"""Rows of a batch over the processes of a group, as torchrun starts them.

Every process has the model and the current run, runs its share of the rows, and gets the values of
all, from which all decide alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor


class Ranks:
    """The default process group of `torch.distributed`, or this process alone.

    Attributes:
        count: How many processes there are.
        index: Of this one.
    """

    def __init__(self) -> None:
        there = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if there else 1
        self.index = distributed.get_rank() if there else 0

    def share(self, rows: int) -> slice:
        """Return which of a batch's rows are this process's; all have as many, but the last."""
        size = -(-rows // self.count)
        return slice(min(self.index * size, rows), min((self.index + 1) * size, rows))

    def gather(self, found: Tensor | None, rows: int, like: Tensor) -> Tensor | None:
        """Return what all have found, ``(2, M)``; None if one of them has nothing.

        Args:
            found: ``(2, m)`` or more, of this process's share.
            rows: M.
            like: Of the dtype and on the device of it.
        """
        if self.count == 1:
            return found
        size = -(-rows // self.count)
        mine = like.new_zeros(3, size)
        if found is not None:
            mine[0] = 1
            count = self.share(rows)
            count = count.stop - count.start
            mine[1:, :count] = found[:, :count]
        every = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(every, mine)
        whole = torch.cat(every, 1)[:, :rows]
        return whole[1:] if bool((torch.stack(every)[:, 0] == 1).all()) else None

    def first(self, value: Tensor) -> Tensor:
        """Return what the first process has."""
        if self.count > 1:
            value = value.contiguous()
            distributed.broadcast(value, 0)
        return value

    def least(self, value: int) -> int:
        """Return the least of what all have."""
        return min(self.every(value))

    def every(self, value: object) -> list:
        """Return what each process has."""
        found = [value]
        if self.count > 1:
            found = [None] * self.count
            distributed.all_gather_object(found, value)
        return found


def alike(ranks: Ranks, key: dict) -> None:
    """Refuse to search in processes that do not search for the same.

    Args:
        ranks: Of them.
        key: What the search depends on.

    Raises:
        ValueError: Another model, task or setting in some process.
    """
    every = ranks.every(key)
    for index, other in enumerate(every):
        differ = sorted(name for name in {*key, *other} if key.get(name) != other.get(name))
        if differ:
            told = ", ".join(f"{name} ({key.get(name)} and {other.get(name)})" for name in differ)
            raise ValueError(
                f"processes {ranks.index} and {index} differ in {told}; give all the same model, "
                "task and settings"
            )
