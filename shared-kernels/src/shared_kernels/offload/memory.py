"""Host memory for stores: exact sizes, page-locked where allowed, limits known beforehand.

``torch``'s pinned allocator rounds every tensor up to a power of two, up to twice the bytes. Here
a buffer is an anonymous mapping of the exact size (rounded up to a page), filled in by several
threads and registered with the driver in place.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from shared_kernels.units import format_bytes

__all__ = [
    "HostBuffer",
    "HostMemoryError",
    "MemoryLimits",
    "memory_limits",
    "require_host_memory",
]


class HostMemoryError(MemoryError):
    """Host memory that was about to be allocated, or locked, cannot be had."""


logger = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
_PREFAULT_CHUNK = 256 << 20


@dataclass(frozen=True)
class MemoryLimits:
    """What this process may still allocate and lock, in bytes; None where there is no limit."""

    available: int
    cgroup_free: int | None
    memlock: int | None

    @property
    def free(self) -> int:
        """The tighter of the machine's available memory and the cgroup's remainder."""
        return self.available if self.cgroup_free is None else min(self.available, self.cgroup_free)


def memory_limits() -> MemoryLimits:
    """Read available memory, cgroup v2 or v1 limits, and RLIMIT_MEMLOCK."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    memlock = None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft
    return MemoryLimits(psutil.virtual_memory().available, _cgroup_free(), memlock)


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    free = []
    for limit_name, used_name, stat_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _cgroup_folders(root, limit_name.startswith("memory/")):
            try:
                limit = (folder / Path(limit_name).name).read_text().strip()
                used = int((folder / Path(used_name).name).read_text())
                stat = (folder / "memory.stat").read_text().split()
            except OSError:
                continue
            if limit == "max" or int(limit) >= 1 << 60:
                continue
            # Page cache that was not used lately is given back before anything is killed.
            cache = int(stat[stat.index(stat_key) + 1]) if stat_key in stat else 0
            free.append(max(0, int(limit) - used + cache))
    return min(free) if free else None


def _cgroup_folders(root: Path, v1: bool) -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    base = root / "memory" if v1 else root
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if (v1 and "memory" in controllers.split(",")) or (not v1 and controllers == ""):
            own = base / path.lstrip("/")
            return [own, *[p for p in own.parents if p == base or base in p.parents]]
    return [base]


def require_host_memory(need: int, *, limit: int | None = None, reserve: int = 512 << 20) -> None:
    """Refuse an allocation that would not fit, before anything is allocated.

    Args:
        need: Bytes about to be allocated.
        limit: The user's own cap in bytes.
        reserve: Bytes left free for everything else in the process.

    Raises:
        HostMemoryError: With the bytes needed and the bytes there are.
    """
    limits = memory_limits()
    have = limits.free - reserve
    if limit is not None and need > limit:
        raise HostMemoryError(
            f"the blocks need {format_bytes(need)} of host memory, the given limit is "
            f"{format_bytes(limit)}; raise OffloadConfig(host=...), or use store='bf16' "
            "(2 bytes a parameter)"
        )
    if need > have:
        bound = "machine" if limits.free == limits.available else "cgroup"
        raise HostMemoryError(
            f"the blocks need {format_bytes(need)} of host memory, {format_bytes(max(have, 0))} "
            f"can be had ({bound} limit, {format_bytes(reserve)} kept in reserve); use "
            "store='bf16', keep more blocks on the GPU with gpu=..., or a machine with more memory"
        )


class HostBuffer:
    """An exact-size host buffer, page-locked if asked.

    Attributes:
        tensor: uint8 view of the mapping, shape (nbytes,).
        registered: Whether the driver has locked it, so that copies are asynchronous.
    """

    def __init__(self, nbytes: int, *, pin: str = "auto", threads: int | None = None) -> None:
        """Map, fill in and register.

        Args:
            nbytes: Size in bytes.
            pin: "auto" registers when CUDA is there and falls back with a warning; "register"
                insists; "bounce" and "none" leave the memory pageable.
            threads: Threads that touch the pages first; default: up to 16 cores.

        Raises:
            HostMemoryError: ``pin="register"`` and the driver refused.
        """
        self.nbytes = nbytes
        self.registered = False
        self._map = mmap.mmap(-1, max(_PAGE, -(-nbytes // _PAGE) * _PAGE))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                logger.debug("huge pages are not available for host buffers")
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self._prefault(threads or min(16, os.cpu_count() or 1))
        if pin in ("auto", "register") and torch.cuda.is_available():
            self._register(insist=pin == "register")

    def _prefault(self, threads: int) -> None:
        pages = torch.frombuffer(self._map, dtype=torch.uint8)
        starts = range(0, len(self._map), _PREFAULT_CHUNK)

        def touch(start: int) -> None:
            pages[start : start + _PREFAULT_CHUNK : _PAGE].zero_()

        if len(starts) == 1:
            touch(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(touch, starts))

    def _register(self, *, insist: bool) -> None:
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(self.tensor.data_ptr(), len(self._map), 0)
        if int(error) == 0:
            self.registered = True
            pointer = self.tensor.data_ptr()
            self._unregister = weakref.finalize(self, _unregister, pointer)
            self._unregister.atexit = False
            return
        memlock = memory_limits().memlock
        text = (
            f"the driver could not lock {format_bytes(self.nbytes)} of host memory (CUDA error "
            f"{int(error)}; RLIMIT_MEMLOCK is "
            f"{'unlimited' if memlock is None else format_bytes(memlock)})"
        )
        if insist:
            raise HostMemoryError(f"{text}; raise `ulimit -l`, or use pin='bounce'")
        logger.warning("%s: copies go through small locked buffers instead", text)

    def close(self) -> None:
        """Unlock the memory; the mapping itself goes when the last view of it does."""
        if self.registered:
            self._unregister()
            self.registered = False


def _unregister(pointer: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(pointer)
