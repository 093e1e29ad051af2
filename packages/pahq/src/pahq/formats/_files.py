"""Files that are not read if too large."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared_kernels._checks import message

if TYPE_CHECKING:
    import os

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
