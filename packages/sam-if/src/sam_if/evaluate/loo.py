"""Leaving one out: predicted effects of single samples against training again without each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

from sam_if.evaluate.agreement import Agreement, values_of
from sam_if.evaluate.retrainings import Retrainings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from sam_if.scores import Scores


@dataclass(frozen=True, eq=False)
class LOOResult(Agreement):
    """Effects of single samples; see `Agreement` for correlations and intervals.

    Attributes:
        samples: Numbers of the m samples.
    """

    samples: tuple[int, ...]


def loo(
    retrain: Callable[[Any], Any],
    scores: Scores | Tensor,
    samples: Iterable[int],
    *,
    together: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LOOResult:
    """Train again without each of some samples, and compare with what scores say.

    Trainings must differ in the sample alone: with the same seeds, and batches in which its place
    stays empty (its loss has weight 0, and what is divided by stays). If a sample that is left out
    moves the others to other batches, what is measured is the noise of shuffling.

    Args:
        retrain: Of a list of samples to leave out, what queries measure, ``(Q,)``; with
            ``together``, of a list of such lists, ``(m, Q)``. It is called with none, too.
        scores: ``(Q, n)``: by how much each query would rise.
        samples: Numbers of the training data.
        together: As many as ``retrain`` takes at a time; see `retrain_together`.
        path: A JSON file where trainings are kept, and gone on from, also with other scores.
        progress: Show a bar.

    Raises:
        ValueError: Samples that are not there, are there twice or are none, a file of another
            question, or trainings that do not return finite numbers of this shape.
    """
    values, numbers = values_of(scores), tuple(int(n) for n in samples)
    count = values.shape[1]
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= n < count for n in numbers):
        remedy = "numbers of the training data"
        raise ValueError(message("samples", f"different ones below {count}", numbers[:5], remedy))
    shape = (values.shape[0], count)
    farm = Retrainings(retrain, shape, together=together, path=path, progress=progress)
    measured = farm.of([(), *((n,) for n in numbers)])
    return LOOResult(values[:, list(numbers)], (measured[1:] - measured[0]).T, numbers)
