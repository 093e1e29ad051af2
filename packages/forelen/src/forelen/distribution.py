"""Distributions over the length of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_tensor, message
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forelen.binning import Bins
    from forelen.calibration import Calibration


class LengthDistribution:
    """How long each of N answers will be, in tokens, the end-of-sequence token included.

    Args:
        pmf: float ``(N, K)``, the probability of each bin; rows sum to 1.
        bins: K bins.
        calibration: Corrects quantiles and intervals; the mean and probabilities stay the head's.
        offset: ``(N,)``, tokens that are there already, if the bins are of what remains beyond
            them; lengths are total then.
        fallback: bool ``(N,)``, rows that are the lengths of training because nothing was known.

    Raises:
        ValueError: Shapes that do not fit, or rows that are no probabilities.
    """

    def __init__(
        self,
        pmf: Tensor,
        bins: Bins,
        *,
        calibration: Calibration | None = None,
        offset: Tensor | None = None,
        fallback: Tensor | None = None,
    ) -> None:
        check_tensor(
            "pmf", pmf, dtypes=(torch.float32, torch.float64), shape=(None, len(bins)),
            strided=True,
        )  # fmt: skip
        total = pmf.sum(-1, dtype=torch.float64)
        if not bool(((pmf >= 0).all(-1) & ((total - 1).abs() < 1e-3)).all()):
            raise ValueError(
                message("pmf", "rows of probabilities", pmf, "take the softmax of the logits")
            )
        self.pmf = pmf.double() / total[:, None]
        self.bins, self.calibration = bins, calibration
        self.offset = torch.zeros_like(total) if offset is None else offset.double()
        none = torch.zeros_like(total, dtype=torch.bool)
        self.fallback = none if fallback is None else fallback

    def __len__(self) -> int:
        return self.pmf.shape[0]

    def __getitem__(self, rows: Any) -> LengthDistribution:
        """Return some of the rows."""
        return LengthDistribution(
            self.pmf[rows], self.bins, calibration=self.calibration, offset=self.offset[rows],
            fallback=self.fallback[rows],
        )  # fmt: skip

    @property
    def calibrated(self) -> bool:
        """Whether quantiles and intervals hold as often as they say."""
        return self.calibration is not None

    def to(self, device: torch.device | str) -> LengthDistribution:
        """Return the same on another device."""
        return LengthDistribution(
            self.pmf.to(device), self.bins, calibration=self.calibration,
            offset=self.offset.to(device), fallback=self.fallback.to(device),
        )  # fmt: skip

    def mean(self) -> Tensor:
        """Return the means, float64 ``(N,)``."""
        return self.pmf @ self.bins.centers().to(self.pmf.device) + self.offset

    def cdf(self, lengths: Tensor) -> Tensor:
        """Return ``P(L <= x)``, float64 ``(N,)``, for x ``(N,)``, or ``(N, X)`` for ``(N, X)``."""
        offset = self.offset if lengths.dim() == 1 else self.offset[:, None]
        below = self.bins.below(lengths - offset)
        pmf = self.pmf if lengths.dim() == 1 else self.pmf[:, None]
        return (below * pmf).sum(-1)

    def sf(self, lengths: Tensor) -> Tensor:
        """Return ``P(L > x)``, as `cdf`."""
        return 1 - self.cdf(lengths)

    def quantile(self, tau: float) -> Tensor:
        """Return the lengths that are not exceeded with probability ``tau``, float64 ``(N,)``.

        With a calibration, on answers like those it was made of.

        Raises:
            ValueError: ``tau`` is not in (0, 1).
        """
        if not 0 < tau < 1:
            raise ValueError(message("tau", "a number in (0, 1)", tau, "0.5 is the median"))
        return self._inverse(self._level(tau))

    def median(self) -> Tensor:
        """Return the medians, float64 ``(N,)``."""
        return self.quantile(0.5)

    def interval(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the central interval that holds the length with probability ``1 - alpha``.

        Raises:
            ValueError: ``alpha`` is not in (0, 1).
        """
        low, high = self.levels(alpha)
        return self._inverse(low), self._inverse(high)

    def levels(self, alpha: float) -> tuple[float, float]:
        """Return the probabilities of the uncorrected distribution below the ends of `interval`.

        Raises:
            ValueError: ``alpha`` is not in (0, 1).
        """
        if not 0 < alpha < 1:
            raise ValueError(message("alpha", "a number in (0, 1)", alpha, "0.1 leaves out 10 %"))
        return self._level(alpha / 2, lower=True), self._level(1 - alpha / 2)

    def _level(self, tau: float, *, lower: bool = False) -> float:
        return tau if self.calibration is None else self.calibration.level(tau, lower=lower)

    def _inverse(self, level: float) -> Tensor:
        """Return the smallest length whose cumulative probability reaches a level."""
        ends = self.bins.closed_edges().to(self.pmf.device)
        before = self.pmf.cumsum(-1)
        closed = len(ends) - 1
        if level >= 1 and self.bins.tail is not None:
            return torch.full_like(self.offset, float("inf"))
        level = min(max(level, 0.0), 1.0)
        place = (before < level - 1e-12).sum(-1).clamp(max=len(self.bins) - 1)
        inside = self.pmf.gather(1, place[:, None])[:, 0].clamp(min=1e-300)
        share = (level - (before.gather(1, place[:, None])[:, 0] - inside)) / inside
        share = share.clamp(0, 1)
        low = ends[place.clamp(max=closed)]
        width = ends.diff()[place.clamp(max=closed - 1)]
        found = low + width * share
        if self.bins.tail is not None:
            ratio = torch.tensor(1 - 1 / self.bins.tail, dtype=torch.float64, device=ends.device)
            beyond = torch.log1p(-share.clamp(max=1 - 1e-15)) / ratio.log()
            found = torch.where(place >= closed, ends[-1] + beyond, found)
        if self.bins.integers:
            # rounding up, but not over what is an integer but for the last bits
            found = torch.ceil(found - 1e-9).clamp(min=1)
        return found + self.offset

    def tokens(self, longest: int) -> Tensor:
        """Return ``P(L = x)`` for x = 1 .. ``longest``, float64 ``(N, longest)``.

        What is longer is not in it.
        """
        grid = torch.arange(longest + 1, device=self.pmf.device).double()
        return self.cdf(grid.expand(len(self), -1)).diff(dim=-1).clamp(min=0)

    def after(self, seen: Tensor) -> LengthDistribution:
        """Return what remains of answers that have ``seen`` ``(N,)`` tokens and have not ended.

        ``P(L - seen = r | L > seen)`` token by token; as `quantile`, but not calibrated.
        """
        from forelen.binning import Bins

        end = max(2, self.end())
        pmf = self.tokens(end)
        places = torch.arange(end, device=pmf.device) + seen.long()[:, None]
        found = torch.where(places < end, pmf.gather(1, places.clamp(max=end - 1)), 0.0)
        total = found.sum(-1, keepdim=True)
        # nothing is left of a distribution that has been outlived: one token, again and again
        last = torch.zeros_like(found)
        last[:, 0] = 1.0
        found = torch.where(total > 1e-12, found / total.clamp(min=1e-300), last)
        edges = tuple(float(edge) for edge in range(end + 1))
        return LengthDistribution(found, Bins(edges), fallback=self.fallback)

    def remaining(self, seen: Tensor) -> Tensor:
        """Return the mean number of tokens still to come after ``seen`` ``(N,)``, float64 ``(N,)``.

        ``sum_x>=seen P(L > x) / P(L > seen)``, at least 1.
        """
        grid = torch.arange(self.end(), device=self.pmf.device)
        above = self.sf(grid.double().expand(len(self), -1))
        counted = torch.where(grid >= seen[:, None], above, 0.0).sum(-1)
        return (counted / self.sf(seen.double()).clamp(min=1e-12)).clamp(min=1)

    def capped_mean(self, cap: int | None) -> Tensor:
        """Return ``E[min(L, cap)]``, float64 ``(N,)``; without a cap the mean."""
        if cap is None:
            return self.mean()
        grid = torch.arange(cap, device=self.pmf.device).double()
        return self.sf(grid.expand(len(self), -1)).sum(-1)

    def crps(self, lengths: Tensor, cap: int | None = None) -> Tensor:
        """Return the continuous ranked probability score of lengths ``(N,)``, float64 ``(N,)``.

        ``sum_x (P(L <= x) - [y <= x])^2`` over whole numbers x, below the cap if there is one.
        """
        longest = int(lengths.max()) + 1 if len(lengths) else 1
        end = cap if cap is not None else max(self.end(), longest)
        grid = torch.arange(end, device=self.pmf.device).double()
        reached = (lengths.to(self.pmf.device).double()[:, None] <= grid).double()
        return ((self.cdf(grid.expand(len(self), -1)) - reached) ** 2).sum(-1)

    def expected_max(self, groups: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Return ``E[max L]`` of each group of rows, float64 ``(G,)``; by default of all rows.

        Lengths are taken to be independent: ``sum_x>=0 (1 - prod_i P(L_i <= x))``.
        """
        grid = torch.arange(self.end(), device=self.pmf.device).double()
        cdf = self.cdf(grid.expand(len(self), -1))
        found = [
            (1 - cdf[list(group)].prod(0)).sum()
            for group in (groups if groups is not None else [range(len(self))])
        ]
        return torch.stack(found) if found else self.pmf.new_zeros(0)

    def end(self) -> int:
        """Return a length that next to nothing exceeds."""
        last = float(self.bins.edges[-1]) + float(self.offset.max()) if len(self) else 0.0
        if self.bins.tail is not None:
            last += 20 * self.bins.tail
        return int(last) + 1

    def __repr__(self) -> str:
        means = ", ".join(f"{value:.0f}" for value in self.mean()[:4].tolist())
        more = ", …" if len(self) > 4 else ""
        return f"LengthDistribution({len(self)} answers, means {means}{more})"
