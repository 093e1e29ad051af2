"""Checks of numbers; their messages name the value and what was expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def check_real(name: str, value: Any, expected: str, ok: Callable[[float], bool]) -> None:
    """Refuse what is no finite number, or not ``ok``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number {expected}, got {value!r}")
    if not math.isfinite(value) or not ok(value):
        raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Refuse what is not strictly between 0 and 1."""
    check_real(name, value, "between 0 and 1, both excluded", lambda v: 0 < v < 1)


def check_rate(name: str, value: Any) -> None:
    """Refuse what is no probability above 0."""
    check_real(name, value, "above 0 and at most 1", lambda v: 0 < v <= 1)


def check_whole(name: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, type(None))):
        raise TypeError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if value is None or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_seed(seed: Any, *, secure: bool) -> None:
    """Refuse a seed beside a secure generator, and a repeatable one without."""
    if secure and seed is not None:
        raise ValueError(f"seed: expected None, got {seed!r}; a seed needs secure=False")
    if secure:
        return
    if isinstance(seed, bool) or not isinstance(seed, (int, type(None))):
        raise TypeError(f"seed: expected a whole number in [0, 2**64), got {seed!r}")
    if seed is None or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected a whole number in [0, 2**64), got {seed!r}")
