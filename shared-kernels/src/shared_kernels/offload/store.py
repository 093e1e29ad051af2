"""Where the units live: in host memory, streamed, or on the device for good.

The ring gives a streamed unit its place on the device for the time of a visit. Slots are
allocated once; which unit a slot holds, which streams of it have been loaded and what must happen
before the slot may be overwritten is bookkeeping on the host, ordered on the device by tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shared_kernels.offload.memory import HostBuffer, require_host_memory
from shared_kernels.offload.transfer import Token, Transfer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shared_kernels.offload.layout import RunBuffers, UnitLayout

__all__ = ["DeviceRing", "Slot", "UnitBuffer", "WeightStore"]


class UnitBuffer:
    """A unit's flat buffer and the views that cut it up."""

    def __init__(self, layout: UnitLayout, flat: torch.Tensor) -> None:
        self.layout = layout
        self.flat = flat[: layout.nbytes]
        self.runs: list[RunBuffers] = layout.run_buffers(self.flat)
        self.frozen: list[torch.Tensor] = layout.frozen_views(self.flat)

    def part(self, name: str) -> torch.Tensor:
        """The bytes of one stream group, ``"main"`` or ``"lo"``."""
        cut = self.layout.main_nbytes
        return self.flat[:cut] if name == "main" else self.flat[cut:]


class WeightStore:
    """Home of every unit: host memory of exact size, or a device buffer.

    ``version[i]`` is the number of update records folded into unit ``i``; whoever writes units
    through the engine keeps it.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        device: torch.device,
        on_device: Iterable[int],
        *,
        pin: str = "auto",
        host_limit: int | None = None,
        freed_meanwhile: int = 0,
    ) -> None:
        """Check that the homes will fit.

        Args:
            layouts: One layout per unit.
            device: The computing device.
            on_device: Indices of units that live on the device.
            pin: See :class:`HostBuffer`.
            host_limit: The user's cap on host bytes.
            freed_meanwhile: Host bytes that are given back while the homes are filled, as when a
                model's own parameters are dropped unit by unit.

        Raises:
            HostMemoryError: The host part does not fit; nothing was allocated.
        """
        self.layouts = list(layouts)
        self.device = device
        self.on_device = frozenset(on_device)
        self.version = [0] * len(self.layouts)
        self.streamed = [k for k in range(len(self.layouts)) if k not in self.on_device]
        self.host_nbytes = sum(self.layouts[k].nbytes for k in self.streamed)
        require_host_memory(self.host_nbytes - freed_meanwhile, limit=host_limit)
        self._pin = pin
        self._host: dict[int, HostBuffer] = {}
        self._homes: dict[int, UnitBuffer] = {}

    def home(self, unit: int) -> UnitBuffer:
        """The unit's home, allocated when first asked for."""
        if unit not in self._homes:
            layout = self.layouts[unit]
            if unit in self.on_device:
                flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self.device)
            else:
                self._host[unit] = HostBuffer(layout.nbytes, pin=self._pin)
                flat = self._host[unit].tensor
            self._homes[unit] = UnitBuffer(layout, flat)
        return self._homes[unit]

    @property
    def registered(self) -> bool:
        """Whether every host buffer is page-locked."""
        return all(self.home(k) and self._host[k].registered for k in self.streamed)

    def close(self) -> None:
        """Unlock host memory."""
        for buffer in self._host.values():
            buffer.close()


@dataclass(eq=False)
class Slot:
    """A place on the device for one unit at a time."""

    flat: torch.Tensor
    unit: int | None = None
    loaded: dict[str, Token] = field(default_factory=dict)
    busy: list[Token] = field(default_factory=list)
    views: dict[tuple, UnitBuffer] = field(default_factory=dict)

    def buffer(self, layout: UnitLayout) -> UnitBuffer:
        """View the slot as the given unit; views are made once per kind of unit."""
        if layout.signature not in self.views:
            self.views[layout.signature] = UnitBuffer(layout, self.flat)
        return self.views[layout.signature]


class DeviceRing:
    """A fixed number of slots that streamed units pass through."""

    def __init__(self, store: WeightStore, transfer: Transfer, slots: int) -> None:
        nbytes = max((store.layouts[k].nbytes for k in store.streamed), default=0)
        self.store = store
        self.transfer = transfer
        self.slots = [
            Slot(torch.zeros(nbytes, dtype=torch.uint8, device=store.device))
            for _ in range(slots if store.streamed else 0)
        ]
        self.nbytes = nbytes * len(self.slots)
        self.uploads: dict[int, int] = dict.fromkeys(store.streamed, 0)
        self.uploaded_bytes = 0
        self.downloaded_bytes = 0
        self._written: dict[int, Token] = {}
        self._held: Slot | None = None

    def holds(self, unit: int) -> bool:
        """Whether a slot has the unit, or is about to."""
        return any(slot.unit == unit for slot in self.slots)

    def request(self, unit: int, parts: Iterable[str], *, keep: Iterable[int] = ()) -> Slot | None:
        """Start loading a unit unless it is there; None if every slot is needed by ``keep``."""
        slot = next((s for s in self.slots if s.unit == unit), None)
        if slot is None:
            kept = set(keep)
            slot = next((s for s in self.slots if s is not self._held and s.unit not in kept), None)
            if slot is None:
                return None
            # Oldest first: a slot that was just filled goes to the back of the queue.
            self.slots.remove(slot)
            self.slots.append(slot)
            slot.unit, slot.loaded = unit, {}
        for part in parts:
            if part not in slot.loaded:
                self._load(slot, unit, part)
        return slot

    def _load(self, slot: Slot, unit: int, part: str) -> None:
        layout = self.store.layouts[unit]
        source = self.store.home(unit).part(part)
        after = [*slot.busy]
        if unit in self._written:
            after.append(self._written[unit])
        if source.numel() == 0:
            slot.loaded[part] = Token()
            return
        target = slot.buffer(layout).part(part)
        slot.loaded[part] = self.transfer.upload(source, target, after)
        self.uploaded_bytes += source.numel()
        if part == "main":
            self.uploads[unit] += 1

    def acquire(self, unit: int, parts: Iterable[str]) -> UnitBuffer:
        """Have the current stream wait for a unit, and hold its slot until :meth:`release`."""
        slot = self.request(unit, parts)
        if slot is None:
            raise RuntimeError("a second unit was acquired before the first was released")
        self._held = slot
        for part in parts:
            slot.loaded[part].wait()
        return slot.buffer(self.store.layouts[unit])

    def write_back(self, unit: int, parts: Iterable[str]) -> None:
        """Copy the held unit to its home once the work queued so far is done."""
        slot = self._held
        if slot is None or slot.unit != unit:
            raise RuntimeError(f"unit {unit} is written back but not held")
        done = self.transfer.mark()
        for part in parts:
            source = slot.buffer(self.store.layouts[unit]).part(part)
            if source.numel():
                token = self.transfer.download(source, self.store.home(unit).part(part), [done])
                self._written[unit] = token
                slot.busy.append(token)
                self.downloaded_bytes += source.numel()

    def release(self) -> None:
        """Let the held slot be overwritten once the work queued so far is done."""
        if self._held is not None:
            writes = [t for t in self._held.busy if t is self._written.get(self._held.unit)]
            self._held.busy = [*writes, self.transfer.mark()]
            self._held = None

    def evict(self) -> None:
        """Forget what the slots hold, after all copies have finished."""
        self.transfer.synchronize()
        for slot in self.slots:
            slot.unit, slot.loaded = None, {}
