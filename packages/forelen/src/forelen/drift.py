"""Noticing that answers are no longer like those of the calibration, and calibrating again."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from shared_kernels._checks import check_range, message

from forelen.calibration import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    from forelen.distribution import LengthDistribution


class DriftMonitor:
    """Watches the levels ``u = F(y)`` of answers that came out, as a trained policy changes.

    While answers are like those of the calibration, levels are distributed as there. One answer to
    each prompt counts, since siblings are not independent; the test is that of Kolmogorov and
    Smirnov for two samples, of the last prompts and of those of the calibration.

    Args:
        calibration: What is served now; None tests against a uniform law.
        window: Prompts to remember.
        seed: Of the draws within a jump of a distribution.
    """

    def __init__(
        self, calibration: Calibration | None = None, *, window: int = 256, seed: int = 0
    ) -> None:
        check_range("window", window, 2, 1 << 31, "some hundred prompts")
        self.calibration = calibration
        self._rng = np.random.default_rng(seed)
        self._groups: deque[np.ndarray] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._groups)

    def observe(
        self,
        found: LengthDistribution,
        lengths: Tensor,
        groups: Tensor,
        *,
        censored: Tensor | None = None,
    ) -> None:
        """Take answers that came out.

        Args:
            found: What was predicted of N answers.
            lengths: int64 ``(N,)``.
            groups: int64 ``(N,)``, the prompt of each.
            censored: bool ``(N,)``, answers that were stopped.

        Raises:
            ValueError: Tensors that do not fit.
        """
        if lengths.shape != (len(found),) or groups.shape != lengths.shape:
            remedy = "give a length and a prompt for each answer"
            raise ValueError(message("lengths", f"{len(found)} lengths", lengths, remedy))
        seed = int(self._rng.integers(1 << 31))
        # fitting draws the levels of a prompt's answers
        for group in groups.unique():
            mine = (groups == group).nonzero()[:, 0]
            part = Calibration.fit(
                found[mine], lengths[mine], groups[mine], seed=seed,
                censored=None if censored is None else censored[mine],
            )  # fmt: skip
            self._groups.append(np.array(part.levels))
            seed += 1

    def p_value(self) -> float:
        """Return how likely a distance as large is if nothing has changed; 1 with few prompts."""
        from scipy.stats import kstwobign

        count = len(self._groups)
        if count < 2:
            return 1.0
        seen = np.sort([self._rng.choice(levels) for levels in self._groups])
        if self.calibration is None:
            expected, effective = seen, float(count)
        else:
            levels = np.array(self.calibration.levels)
            reached = np.cumsum(self.calibration.weights) / self.calibration.prompts
            place = np.searchsorted(levels, seen, side="right")
            expected = np.concatenate([[0.0], reached])[place]
            effective = count * self.calibration.prompts / (count + self.calibration.prompts)
        upper = (np.arange(1, count + 1) / count - expected).max()
        lower = (expected - np.arange(count) / count).max()
        return float(kstwobign.sf(max(upper, lower) * effective**0.5))

    def is_stale(self, level: float = 0.01) -> bool:
        """Return whether answers have changed, so that quantiles no longer hold as promised."""
        return self.p_value() < level

    def recalibrate(self) -> Calibration:
        """Return a calibration of the prompts that are remembered, and go on with it.

        Raises:
            ValueError: Nothing has been observed.
        """
        if not self._groups:
            raise ValueError(message("observed", "some answers", 0, "call observe first"))
        levels = np.concatenate(list(self._groups))
        weights = np.concatenate([np.full(len(g), 1 / len(g)) for g in self._groups])
        order = np.argsort(levels, kind="stable")
        self.calibration = Calibration(
            tuple(levels[order].tolist()), tuple(weights[order].tolist()), len(self._groups)
        )
        return self.calibration
