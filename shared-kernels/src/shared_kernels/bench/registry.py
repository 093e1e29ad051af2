"""Benchmark files: Python files whose functions marked with ``@benchmark`` make workloads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from shared_kernels.bench.arms import Workload

if TYPE_CHECKING:
    from pathlib import Path

BenchmarkFunction = Callable[[str], Iterable[Workload]]
F = TypeVar("F", bound=BenchmarkFunction)

_MARK = "__shared_kernels_benchmark__"


def benchmark(function: F) -> F:
    """Register a function of a benchmark file.

    The function takes the device to run on (``"cpu"`` or ``"cuda"``) and returns or yields
    workloads. Yielding is better for large ones: each workload is released before the next is
    made. Sizes are the function's own choice, by device.
    """
    setattr(function, _MARK, True)
    return function


def load_benchmarks(path: Path) -> dict[str, BenchmarkFunction]:
    """Import a benchmark file and return its registered functions in the order of definition.

    Args:
        path: A Python file.

    Returns:
        The functions by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file registers nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a benchmark file; there is none at {path}")
    spec = importlib.util.spec_from_file_location(f"shared_kernels_benchmark_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file (*.py); got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {
        name: value
        for name, value in vars(module).items()
        if callable(value) and getattr(value, _MARK, False)
    }
    if not found:
        raise ValueError(
            f"expected at least one function marked with @benchmark in {path}; found none"
        )
    return found
