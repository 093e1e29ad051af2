"""Searches with several thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pahq.circuit import Circuit
    from pahq.finder import CircuitFinder
    from pahq.tasks import Task


def sweep(
    finder: CircuitFinder,
    task: Task,
    thresholds: Sequence[float],
    *,
    resume_from: str | Path | None = None,
    **options: Any,
) -> list[Circuit]:
    """Find a circuit for each threshold, as points of `pahq.evaluation.auc_roc` are found.

    The largest comes first, and the edges of its circuit are expected in the next: that spares
    batches, and changes no edge.

    Args:
        finder: Of a model.
        task: Clean and corrupted inputs.
        thresholds: Different ones, in any order.
        resume_from: A folder, in which each threshold has a folder: see `CircuitFinder.acdc`.
        options: Of `CircuitFinder.acdc`.

    Returns:
        Circuits in the order of the thresholds.

    Raises:
        ValueError: No threshold, one that is not positive, one that is there twice, or guesses of
            one's own.
    """
    if "expect" in options:
        raise ValueError(message("expect", "nothing", "edges", "those of the threshold before are"))
    if not len(thresholds) or len(set(thresholds)) < len(thresholds):
        raise ValueError(message("thresholds", "different ones", thresholds, "such as [0.1, 0.01]"))
    if not all(threshold > 0 for threshold in thresholds):
        raise ValueError(message("thresholds", "positive numbers", thresholds, "such as 0.01"))
    found: dict[float, Circuit] = {}
    before = None
    for threshold in sorted(thresholds, reverse=True):
        folder = None if resume_from is None else Path(resume_from) / f"{threshold:g}"
        before = finder.acdc(task, threshold, expect=before, resume_from=folder, **options)
        found[threshold] = before
    return [found[threshold] for threshold in thresholds]
