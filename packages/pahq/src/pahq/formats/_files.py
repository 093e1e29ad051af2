"""Files of tensors: replaced as a whole, and not read if too large."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from shared_kernels._checks import message

#: Bytes of a file that is read. All edges of a model of 126 layers of 128 heads do not fit.
LARGEST = 2 << 30


def check_size(path: str | os.PathLike[str]) -> None:
    """Check that a file is there and not larger than ``LARGEST``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is larger.
    """
    size = Path(path).stat().st_size
    if size > LARGEST:
        remedy = f"write fewer edges to {Path(path).name}, or use Circuit.save_pretrained"
        raise ValueError(message("path", f"a file of at most {LARGEST} bytes", size, remedy))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    The bytes are on the disk when this returns. Folders that are missing are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner only
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
