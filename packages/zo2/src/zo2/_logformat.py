r"""The byte layout of a ``.zolog`` file: header, records, checksums, and the writer's lock.

    magic ``ZOLOG1\r\n`` | u32 header length | UTF-8 JSON header | u32 crc32 of the header
    then records of 28 + 4q bytes, little endian:
    step u32 | seed u64 | lr f32 | weight_decay f32 | g f32[q] | flags u32 | crc32 u32

A record's checksum covers the bytes before it. Every length is bounded before anything is
allocated. Only the standard library and numpy are used.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from zo2.config import MAX_DIRECTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAGIC = b"ZOLOG1\r\n"
MAX_HEADER_BYTES = 64 * 2**20
SKIPPED = 1
"""Flag: the step was measured but not applied (non-finite, or |g| above the clip)."""
FLUSH = 2
"""Flag: not an update; every update before this point was folded into the store here."""

FaultKind = Literal["checksum", "order", "value", "flags", "torn tail"]

_KNOWN_FLAGS = SKIPPED | FLUSH
_PREFIX = len(MAGIC) + 4


class LogError(ValueError):
    """A log that is damaged, or that does not fit what it is used with."""


class LogRecord(NamedTuple):
    """One record.

    Attributes:
        step: Zero-based index of the update. Of a FLUSH: the number of updates before it.
        seed: 64-bit seed of the step's directions. Of a FLUSH: seed of the rounding dither.
        lr: Learning rate, kept as float32.
        weight_decay: λ, kept as float32.
        g: Projected gradient of each direction, (q,).
        flags: SKIPPED and FLUSH bits.
    """

    step: int
    seed: int
    lr: float
    weight_decay: float
    g: Sequence[float]
    flags: int = 0


def record_dtype(q: int) -> np.dtype:
    """Return the packed little-endian numpy type of one record with ``q`` directions."""
    if not 1 <= q <= MAX_DIRECTIONS:
        raise LogError(f"expected 1 to {MAX_DIRECTIONS} directions per record, got q={q}")
    return np.dtype(
        [
            ("step", "<u4"),
            ("seed", "<u8"),
            ("lr", "<f4"),
            ("weight_decay", "<f4"),
            ("g", "<f4", (q,)),
            ("flags", "<u4"),
            ("crc", "<u4"),
        ]
    )


def checksum_fault(row: np.void) -> tuple[FaultKind, str] | None:
    """Return kind and words of a wrong checksum."""
    found, stored = zlib.crc32(row.tobytes()[:-4]), int(row["crc"])
    if found == stored:
        return None
    return "checksum", f"checksum is {found:#010x}, the record says {stored:#010x}"


def fault(row: np.void, expected: int) -> tuple[FaultKind, str] | None:
    """Return kind and words of what is wrong with a record that must have step ``expected``."""
    flags, step = int(row["flags"]), int(row["step"])
    if flags & ~_KNOWN_FLAGS:
        return "flags", f"unknown flags {flags:#x}"
    if step != expected:
        kind = "flush" if flags & FLUSH else "update"
        return "order", f"expected step {expected}, got the {kind} of step {step}"
    if not flags and not (
        np.isfinite(row["g"]).all()
        and math.isfinite(row["lr"])
        and math.isfinite(row["weight_decay"])
    ):
        return "value", "an applied update has a non-finite g, lr or weight decay"
    return None


def next_step(row: np.void) -> int:
    """Return the step that the record after this one must have."""
    return int(row["step"]) + (not int(row["flags"]) & FLUSH)


def encode_header(header: dict[str, Any]) -> bytes:
    """Return magic, length, JSON and checksum."""
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise LogError(f"the log header must hold JSON values only: {error}") from None
    if len(text) > MAX_HEADER_BYTES:
        raise LogError(f"log header of {len(text)} bytes, the format's limit is {MAX_HEADER_BYTES}")
    _header_q(header, "header")
    crc = zlib.crc32(text)
    return MAGIC + len(text).to_bytes(4, "little") + text + crc.to_bytes(4, "little")


def decode_header(fd: int, path: Path) -> tuple[dict[str, Any], int]:
    """Read and check the header; return it and the offset of the first record."""
    size = os.fstat(fd).st_size
    prefix = read_at(fd, 0, _PREFIX)
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)]:
        raise LogError(
            f"{path} is not an update log: it starts with {prefix[:8]!r}, expected {MAGIC!r}"
        )
    length = int.from_bytes(prefix[len(MAGIC) :], "little")
    start = _PREFIX + length + 4
    if length > MAX_HEADER_BYTES:
        raise LogError(
            f"{path}: header of {length} bytes, the format's limit is {MAX_HEADER_BYTES}"
        )
    if size < start:
        raise LogError(
            f"{path}: the header was never finished, so the log holds no step; delete the file"
        )
    body = read_at(fd, _PREFIX, length + 4)
    text, stored = body[:length], int.from_bytes(body[length:], "little")
    if zlib.crc32(text) != stored:
        raise LogError(
            f"{path}: header checksum is {zlib.crc32(text):#010x}, the file says {stored:#010x}; "
            "restore the file from a copy"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LogError(f"{path}: the header is not JSON: {error}") from None
    _header_q(header, str(path))
    return header, start


def _header_q(header: Any, where: str) -> int:
    q = header.get("q") if isinstance(header, dict) else None
    if isinstance(q, bool) or not isinstance(q, int) or not 1 <= q <= MAX_DIRECTIONS:
        raise LogError(f"{where}: expected 'q' from 1 to {MAX_DIRECTIONS} in the header, got {q!r}")
    return q


def write_all(fd: int, data: bytes) -> None:
    """Write all bytes at the current position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read up to ``size`` bytes from ``offset``; fewer at the end of the file."""
    parts = []
    while size > 0:
        if hasattr(os, "pread"):
            part = os.pread(fd, min(size, 2**30), offset)
        else:
            os.lseek(fd, offset, os.SEEK_SET)
            part = os.read(fd, min(size, 2**30))
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def lock(fd: int, path: Path) -> None:
    """Take the writer's lock, or raise at once."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(fd, 2**62, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BlockingIOError(
            f"{path} is being written by another process (or an engine of this one); close that "
            "writer first, or open the log with mode='r'"
        ) from None
