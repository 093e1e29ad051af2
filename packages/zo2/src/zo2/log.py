"""The update log: everything a zeroth-order run did, in 32 bytes a step.

A step of zeroth-order fine-tuning is fixed by its seed and one measured scalar per direction, so
base weights plus this log are the fine-tuned model. The file is append-only and holds data only;
`zo2._logformat` has the byte layout.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zo2._logformat import (
    FLUSH,
    MAX_HEADER_BYTES,
    SKIPPED,
    FaultKind,
    LogError,
    LogRecord,
    checksum_fault,
    decode_header,
    encode_header,
    fault,
    lock,
    next_step,
    read_at,
    record_dtype,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

__all__ = [
    "FLUSH",
    "MAX_HEADER_BYTES",
    "SKIPPED",
    "Damage",
    "LogError",
    "LogRecord",
    "LogReport",
    "UpdateLog",
    "record_dtype",
]

logger = logging.getLogger(__name__)

_MAX_READ_BYTES = 4 * 2**30
_SCAN_BYTES = 4 * 2**20
_MAX_DAMAGE = 1000
_writers: weakref.WeakSet[UpdateLog] = weakref.WeakSet()


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One fault found in a log.

    Attributes:
        kind: ``"checksum"``, ``"order"``, ``"value"``, ``"flags"`` or ``"torn tail"``.
        index: Index of the record (of a torn tail: the number of whole records before it).
        offset: Byte offset of the record in the file.
        message: What is wrong, in words.
    """

    kind: FaultKind
    index: int
    offset: int
    message: str


@dataclass(frozen=True, kw_only=True)
class LogReport:
    """What `UpdateLog.verify` found.

    Attributes:
        records: Whole records in the file.
        updates: Records that are updates (not flushes).
        torn_bytes: Bytes after the last whole record.
        damage: The faults, in file order; the first 1000 are kept.
    """

    records: int
    updates: int
    torn_bytes: int
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether the file is sound to its last byte."""
        return not self.damage

    @property
    def usable(self) -> int:
        """Number of leading records before the first fault."""
        return min((d.index for d in self.damage), default=self.records)


class UpdateLog:
    """An update log on disk, open for reading or appending.

    Use `create` for a new log and `open` for one that exists; both give context managers.
    One writer at a time (held by a file lock); any number may read meanwhile.

    Attributes:
        path: The file.
        mode: ``"r"`` or ``"a"``.
        header: The JSON header, as a dict.
        dtype: numpy type of a record, see `record_dtype`.

    Example:
        >>> with UpdateLog.open("run.zolog") as log:  # doctest: +SKIP
        ...     log.verify().ok, log.records["g"].mean()
    """

    def __init__(
        self, path: Path, fd: int, header: dict[str, Any], start: int, mode: str, fsync_every: int
    ) -> None:
        if fsync_every < 1:
            raise ValueError(f"expected fsync_every of at least 1, got {fsync_every!r}")
        self.path = path
        self.header = header
        self.mode = mode
        self.dtype = record_dtype(header["q"])
        self._fd = fd
        self._start = start
        self._fsync_every = fsync_every
        self._unsynced = 0
        self._count = len(self)
        self._next_step = self._following(self._count)
        if mode == "a":
            _writers.add(self)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], header: dict[str, Any], *, fsync_every: int = 16
    ) -> UpdateLog:
        """Start a new log and keep it open for appending.

        Args:
            path: File to make; it must not exist.
            header: JSON values; ``q`` is required (`zo2.fingerprint.make_header` builds the whole).
            fsync_every: Records after which the file is forced to the disk. A killed process
                loses nothing either way; a machine that loses power loses at most this many.

        Raises:
            FileExistsError: The file exists.
            LogError: The header is not JSON, too long, or lacks a valid ``q``.
        """
        path = Path(path)
        payload = encode_header(header)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o644)
        except FileExistsError:
            raise FileExistsError(
                f"{path} exists; continue it with UpdateLog.open(path, mode='a') or choose another "
                "name, a log is never overwritten"
            ) from None
        try:
            lock(fd, path)
            write_all(fd, payload)
            os.fsync(fd)
            return cls(path, fd, json.loads(json.dumps(header)), len(payload), "a", fsync_every)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        fsync_every: int = 16,
        verify: bool = True,
    ) -> UpdateLog:
        """Open a log that exists.

        Opened for appending, a torn tail (a record whose writing was cut off) is removed with a
        warning; any other damage is refused, naming the record.

        Args:
            path: The file.
            mode: ``"r"`` to read, ``"a"`` to continue it.
            fsync_every: As in `create`.
            verify: Check all records before appending; ``False`` serves to cut a damaged log.

        Raises:
            FileNotFoundError: There is no such file.
            LogError: Not a log, a damaged header, or (for ``"a"``) damaged records.
            BlockingIOError: There is another writer (mode ``"a"``).
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise ValueError(f"expected mode 'r' (read) or 'a' (append), got {mode!r}")
        fd = os.open(path, (os.O_RDONLY if mode == "r" else os.O_RDWR) | _BINARY)
        try:
            if mode == "a":
                lock(fd, path)
            header, start = decode_header(fd, path)
            log = cls(path, fd, header, start, mode, fsync_every)
            if mode == "a" and verify:
                log._repair()
            return log
        except BaseException:
            os.close(fd)
            raise

    def append(self, record: LogRecord | Sequence[Any]) -> None:
        """Write one record at the end.

        Args:
            record: A `LogRecord`, or its values in the same order.

        Raises:
            LogError: A value does not fit its field, g has not q entries, the step does not
                follow the last one, or an update to be applied has a non-finite g, lr or λ.
            ValueError: The log is closed or open for reading only.
            OSError: The disk refused; the log is left as it was.
        """
        self._writable()
        row = self._pack(LogRecord(*record))
        wrong = fault(row[0], self._next_step)
        if wrong:
            raise LogError(f"{self.path}: record {self._count} refused: {wrong[1]}")
        try:
            os.lseek(self._fd, self._offset(self._count), os.SEEK_SET)
            write_all(self._fd, row.tobytes())
        except OSError:
            os.ftruncate(self._fd, self._offset(self._count))
            raise
        self._count += 1
        self._next_step = next_step(row[0])
        self._unsynced += 1
        if self._unsynced >= self._fsync_every:
            self.sync()

    def sync(self) -> None:
        """Force everything appended so far to the disk."""
        if self._unsynced:
            os.fsync(self._fd)
            self._unsynced = 0

    @property
    def records(self) -> np.ndarray:
        """All whole records, a structured array (n,) of `dtype`; not verified.

        Raises:
            LogError: They need over 4 GiB; take them in parts with `read`.
        """
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return records ``start`` to ``stop - 1`` (fewer at the end of the file), not verified."""
        stop = max(start, min(stop, len(self)))
        size = (stop - start) * self.dtype.itemsize
        if size > _MAX_READ_BYTES:
            raise LogError(
                f"{self.path}: {stop - start} records need {size} bytes, over the limit of "
                f"{_MAX_READ_BYTES}; take them in parts with read(start, stop)"
            )
        data = read_at(self._fd, self._offset(start), size)
        return np.frombuffer(data, self.dtype, count=len(data) // self.dtype.itemsize)

    def __len__(self) -> int:
        """Return the number of whole records."""
        return max(0, self._size() - self._start) // self.dtype.itemsize

    def verify(self) -> LogReport:
        """Check every record: checksum, order of steps, values and flags; and the tail.

        Returns:
            The faults found; `LogReport.ok` says whether there are none.
        """
        damage: list[Damage] = []
        size, expected, updates = self._size(), 0, 0
        total = max(0, size - self._start) // self.dtype.itemsize
        for index, row in self._scan(total):
            unreadable = checksum_fault(row)
            wrong = unreadable or fault(row, expected)
            flush = int(row["flags"]) & FLUSH
            updates += not flush
            expected = expected + (not flush) if unreadable else next_step(row)
            if wrong and len(damage) < _MAX_DAMAGE:
                offset = self._offset(index)
                message = f"record {index} at byte {offset}: {wrong[1]}"
                damage.append(Damage(kind=wrong[0], index=index, offset=offset, message=message))
        end = self._offset(total)
        if size > end:
            message = f"torn tail: {size - end} bytes at byte {end} after {total} whole records"
            damage.append(Damage(kind="torn tail", index=total, offset=end, message=message))
        return LogReport(
            records=total, updates=updates, torn_bytes=size - end, damage=tuple(damage)
        )

    def truncate(self, n: int) -> None:
        """Keep the first ``n`` records and drop the rest, a torn tail included.

        Raises:
            LogError: ``n`` is negative or beyond the whole records there are.
            ValueError: The log is closed or open for reading only.
        """
        self._writable()
        if not 0 <= n <= len(self):
            raise LogError(f"{self.path}: expected to keep 0 to {len(self)} records, got {n}")
        os.ftruncate(self._fd, self._offset(n))
        os.fsync(self._fd)
        self._count, self._unsynced = n, 0
        self._next_step = self._following(n)

    def close(self) -> None:
        """Sync and close the file, and release its lock; closing twice is fine."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> UpdateLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{len(self)} records" if self._fd >= 0 else "closed"
        return f"UpdateLog({str(self.path)!r}, mode={self.mode!r}, {state})"

    def _following(self, n: int) -> int:
        return next_step(self.read(n - 1, n)[0]) if n else 0

    def _writable(self) -> None:
        if self._fd < 0 or self.mode != "a":
            state = "closed" if self._fd < 0 else "open for reading"
            raise ValueError(f"{self.path} is {state}; use UpdateLog.open(path, mode='a')")

    def _pack(self, record: LogRecord) -> np.ndarray:
        q = self.header["q"]
        with np.errstate(over="ignore"):
            g = np.atleast_1d(np.asarray(record.g, dtype=np.float32))
        if g.shape != (q,):
            raise LogError(
                f"{self.path}: expected g with {q} entries (q in the header), got shape {g.shape}"
            )
        for name, bits in (("step", 32), ("seed", 64), ("flags", 32)):
            value = getattr(record, name)
            if not 0 <= int(value) < 2**bits:
                raise LogError(f"{self.path}: expected {name} in [0, 2**{bits}), got {value!r}")
        row = np.zeros(1, self.dtype)
        row[0] = (record.step, record.seed, record.lr, record.weight_decay, g, record.flags, 0)
        row["crc"] = zlib.crc32(row.tobytes()[:-4])
        return row

    def _repair(self) -> None:
        report = self.verify()
        broken = [d for d in report.damage if d.kind != "torn tail"]
        keep = report.records
        # A file system that lost power may have extended the file before it wrote the data: a
        # record of zeros at the end was never written.
        while (
            broken
            and broken[-1].index == keep - 1
            and not any(self.read(keep - 1, keep)[0].tobytes())
        ):
            broken.pop()
            keep -= 1
        if broken:
            raise LogError(
                f"{self.path}: {broken[0].message} ({len(broken)} damaged of {report.records} "
                f"records); keep the sound ones before it with 'zo2 log truncate {self.path} "
                f"{broken[0].index}', or restore the file from a copy"
            )
        if keep < report.records or report.torn_bytes:
            torn = report.torn_bytes + (report.records - keep) * self.dtype.itemsize
            logger.warning(
                "%s: removed a torn tail of %d bytes; %d whole records are kept",
                self.path,
                torn,
                keep,
            )
            self.truncate(keep)

    def _size(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        return os.fstat(self._fd).st_size

    def _offset(self, n: int) -> int:
        return self._start + n * self.dtype.itemsize

    def _scan(self, total: int) -> Iterator[tuple[int, np.void]]:
        stride = max(1, _SCAN_BYTES // self.dtype.itemsize)
        for start in range(0, total, stride):
            yield from enumerate(self.read(start, min(start + stride, total)), start)


_BINARY = getattr(os, "O_BINARY", 0)


def _forget_writers() -> None:
    # A forked data-loader worker inherits the descriptor and with it the lock, which would then
    # outlive a killed writer; closing the child's copy leaves the writer's lock in place.
    for log in list(_writers):
        if log._fd >= 0:
            os.close(log._fd)
            log._fd = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_writers)
