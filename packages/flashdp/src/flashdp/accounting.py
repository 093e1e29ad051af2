"""What a run has spent: composition of the steps really taken, and the noise that a budget needs.

All numbers come from Google's dp-accounting; nothing is derived here but the split between
gradients and the counts of adaptive thresholds. Bounds are upper bounds.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashdp._checks import check_fraction, check_rate, check_real, check_whole
from flashdp.config import AccountantKind
from flashdp.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Sampling = Literal["poisson", "truncated", "every_step"]

_FINE, _COARSE = 1e-4, 1e-3
# Fractional orders are slow, and complain where their series does not converge.
_WHOLE_ORDERS = (*range(2, 64), 128, 256, 512, 1024)
_SMALLEST_SIGMA, _LARGEST_SIGMA = 0.05, 1e6


class UnattainableError(RuntimeError):
    """No amount of noise that this accountant can certify reaches the target."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One step as the accountant sees it: a Gaussian mechanism on a random part of the units.

    Attributes:
        noise_multiplier: σ, standard deviation over L2 sensitivity.
        sample_rate: q, the probability with which each unit takes part.
        sampling: ``"poisson"``: every unit independently. ``"truncated"``: the same, and a draw
            of more than ``truncated_batch_size`` units is cut to a uniformly chosen subset.
            ``"every_step"``: no amplification is claimed; a unit may take part in every step, at
            ``sample_rate`` 1. This is for batches that were not drawn at random, and then covers
            data sets that differ in one unit's contribution being left out, all batches staying
            as they are; it does not cover a unit whose removal moves others between batches.
        dataset_size: Number of units, for truncation only; thereby public.
        truncated_batch_size: The cap.
    """

    noise_multiplier: float
    sample_rate: float
    sampling: Sampling = "poisson"
    dataset_size: int | None = None
    truncated_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_real(
            "Mechanism.noise_multiplier", self.noise_multiplier, "at least 0", lambda v: v >= 0
        )
        check_rate("Mechanism.sample_rate", self.sample_rate)
        options = typing.get_args(Sampling)
        if self.sampling not in options:
            raise ValueError(
                f"Mechanism.sampling: {self.sampling!r} is none of {', '.join(options)}; batches "
                "that were not drawn by Poisson sampling are accounted as 'every_step'"
            )
        for name in ("dataset_size", "truncated_batch_size"):
            value = getattr(self, name)
            if self.sampling == "truncated":
                check_whole(f"Mechanism.{name}", value)
            elif value is not None:
                raise ValueError(
                    f"Mechanism.{name}: expected None with sampling={self.sampling!r}, got {value}"
                )
        if self.sampling == "every_step" and self.sample_rate != 1:
            raise ValueError(
                f"Mechanism.sample_rate: expected 1 with sampling='every_step', got "
                f"{self.sample_rate}; only random sampling earns a smaller rate"
            )

    def event(self, steps: int) -> Any:
        """Return dp-accounting's description of ``steps`` such steps."""
        import dp_accounting as dp

        if self.dataset_size is not None and self.truncated_batch_size is not None:
            one = dp.TruncatedSubsampledGaussianDpEvent(
                self.dataset_size,
                self.sample_rate,
                self.truncated_batch_size,
                self.noise_multiplier,
            )
        else:
            one = dp.GaussianDpEvent(self.noise_multiplier)
            if self.sample_rate < 1:
                one = dp.PoissonSampledDpEvent(self.sample_rate, one)
        return dp.SelfComposedDpEvent(one, steps)


class Accountant:
    """Adds up the steps of a run.

    Args:
        kind: ``"pld"`` composes privacy loss distributions, tight to three digits; ``"rdp"`` is
            faster and looser.
        mechanism: What `step` counts if not told otherwise.

    Example:
        >>> accountant = Accountant("rdp", Mechanism(noise_multiplier=1.0, sample_rate=0.01024))
        >>> accountant.step(steps=1000)
        >>> round(accountant.epsilon(delta=1e-5), 3)
        2.15
    """

    def __init__(self, kind: AccountantKind = "pld", mechanism: Mechanism | None = None) -> None:
        if kind not in typing.get_args(AccountantKind):
            raise ValueError(
                f"accountant: {kind!r} is none of 'pld', 'rdp'; 'pld' is as tight as any other"
            )
        self.kind: AccountantKind = kind
        self.mechanism = mechanism
        self._history: list[tuple[Mechanism, int]] = []
        if mechanism is not None:
            self._check(mechanism)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return sum(steps for _, steps in self._history)

    @property
    def history(self) -> tuple[tuple[Mechanism, int], ...]:
        """The mechanisms of the steps taken, and for how many steps each was used."""
        return tuple(self._history)

    @property
    def version(self) -> str:
        """What computes the numbers, and its version."""
        from importlib.metadata import version

        return f"dp-accounting {version('dp-accounting')}"

    def step(self, mechanism: Mechanism | None = None, *, steps: int = 1) -> None:
        """Count steps; call it before the result of a step is used.

        Args:
            mechanism: The mechanism used; ``None`` takes the accountant's own.
            steps: Number of steps.
        """
        used = mechanism or self._own()
        self._check(used)
        check_whole("steps", steps)
        if self._history and self._history[-1][0] == used:
            steps += self._history.pop()[1]
        self._history.append((used, steps))

    def epsilon(self, delta: float) -> float:
        """Return ε of all steps taken, at ``delta``; infinite if one of them had no noise."""
        check_fraction("delta", delta)
        return _epsilon(self.kind, self._history, delta)

    def delta(self, epsilon: float) -> float:
        """Return δ of all steps taken, at ``epsilon``; 1 if one of them had no noise."""
        check_real("epsilon", epsilon, "at least 0", lambda v: v >= 0)
        if not self._history:
            return 0.0
        if any(m.noise_multiplier == 0 for m, _ in self._history):
            return 1.0
        return min(1.0, float(_composed(self.kind, self._history, _FINE).get_delta(epsilon)))

    def steps_within(
        self, epsilon: float, delta: float, *, limit: int, mechanism: Mechanism | None = None
    ) -> int:
        """Return how many further steps fit into a budget.

        Args:
            epsilon: The budget's ε.
            delta: Its δ.
            limit: The answer is at most this.
            mechanism: Of the further steps; ``None`` takes the accountant's own.
        """
        check_real("epsilon", epsilon, "at least 0", lambda v: v >= 0)
        check_fraction("delta", delta)
        used = mechanism or self._own()
        self._check(used)

        def fits(steps: int) -> bool:
            history = [*self._history, (used, steps)] if steps else self._history
            return _epsilon(self.kind, history, delta) <= epsilon

        if fits(limit):
            return limit
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def state_dict(self) -> dict[str, Any]:
        """Return the steps taken as JSON values."""
        history = [{**dataclasses.asdict(m), "steps": steps} for m, steps in self._history]
        return {"version": 1, "kind": self.kind, "history": history}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Continue from what `state_dict` returned.

        Args:
            state: The state.
            strict: Refuse a state whose last steps were of another mechanism than the
                accountant's own. Without it such a run goes on, and both are added up.

        Raises:
            ValueError: The state is not an accountant's, is of another kind or mechanism, or this
                accountant has counted steps already, which would be forgotten.
        """
        if state.get("version") != 1 or not isinstance(state.get("history"), list):
            raise ValueError(f"expected the state of an accountant, version 1, got {state!r:.200}")
        if state.get("kind") != self.kind:
            raise ValueError(
                f"the state is of an accountant of kind {state.get('kind')!r}, this one is of kind "
                f"{self.kind!r}; make one of the same kind"
            )
        if self._history:
            raise ValueError(
                f"this accountant already holds {self.steps} step(s), which loading would forget; "
                "load the state into a new one"
            )
        loaded = [_entry(entry) for entry in state["history"]]
        if strict and loaded and self.mechanism not in (None, loaded[-1][0]):
            then, now = dataclasses.asdict(loaded[-1][0]), dataclasses.asdict(self._own())
            changes = [f"{k} {then[k]!r} -> {now[k]!r}" for k in then if then[k] != now[k]]
            raise ValueError(
                f"the state is of a run with another mechanism: {', '.join(changes)}; set it as it "
                "was, or load with strict=False to add the steps of both"
            )
        for mechanism, _ in loaded:
            self._check(mechanism)
        self._history = loaded

    def _own(self) -> Mechanism:
        if self.mechanism is None:
            raise ValueError("expected a mechanism: this accountant was made without one")
        return self.mechanism

    def _check(self, mechanism: Mechanism) -> None:
        if self.kind == "rdp" and mechanism.sampling == "truncated":
            raise ValueError(
                "accountant 'rdp' has no bound for truncated Poisson sampling; use 'pld', or leave "
                "draws as they are"
            )


def calibrate(
    target_epsilon: float,
    target_delta: float,
    *,
    sample_rate: float,
    steps: int,
    kind: AccountantKind = "pld",
    sampling: Sampling = "poisson",
    dataset_size: int | None = None,
    truncated_batch_size: int | None = None,
) -> float:
    """Return the noise multiplier that spends a budget over a number of steps.

    Args:
        target_epsilon: ε.
        target_delta: δ.
        sample_rate: Probability with which each unit enters a step.
        steps: Steps to be taken.
        kind: The accountant that has to certify it.
        sampling: As in `Mechanism`, like the two that follow.
        dataset_size: Number of units, for truncated draws.
        truncated_batch_size: Cap of truncated draws.

    Returns:
        σ, rounded up to four digits: ε at the result is at most the target, and at a σ one unit
        of the fourth digit smaller it is above. At least 0.05; the
        target may allow less.

    Raises:
        UnattainableError: No σ up to a million does it.
    """
    check_real("target_epsilon", target_epsilon, "above 0", lambda v: v > 0)
    check_fraction("target_delta", target_delta)
    accountant = Accountant(kind)

    def cost(sigma: float, interval: float = _FINE) -> float:
        mechanism = Mechanism(
            noise_multiplier=sigma,
            sample_rate=sample_rate,
            sampling=sampling,
            dataset_size=dataset_size,
            truncated_batch_size=truncated_batch_size,
        )
        accountant._check(mechanism)
        return _epsilon(kind, [(mechanism, steps)], target_delta, interval)

    check_whole("steps", steps)
    interval = max(_FINE, min(_COARSE, target_epsilon / 1000))
    start = _rdp_guess(target_epsilon, target_delta, sample_rate, steps)
    low, high = _bracket(lambda sigma: cost(sigma, interval) > target_epsilon, start)
    if high > _LARGEST_SIGMA:
        raise UnattainableError(
            f"no noise multiplier up to {_LARGEST_SIGMA:g} gives epsilon {target_epsilon:g} at "
            f"delta {target_delta:g} over {steps} steps at sample rate {sample_rate:g}: the "
            f"accountant certifies {cost(_LARGEST_SIGMA):g} there; ask for more"
        )
    if high <= _SMALLEST_SIGMA:
        return _SMALLEST_SIGMA
    while (unit := _unit(high)) < high - low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle, interval) > target_epsilon else (low, middle)
    # The coarse grid overestimates a little: walk on the grid of results with the fine one.
    digit = math.ceil(high / unit)
    while cost(_decimal(digit, unit)) > target_epsilon:
        digit += 1
    while cost(_decimal(digit - 1, unit)) <= target_epsilon:
        digit -= 1
    return _decimal(digit, unit)


def adaptive_split(sigma: float, groups: int, share: float) -> tuple[float, float]:
    """Split the noise of a step between gradients and the counts of adaptive thresholds.

    Each of K groups counts the units below its threshold, centred to ±1/2, so that one unit moves
    the K counts by √K/2 together. With σ_b on each count and σ_g on the gradients, both together
    are one Gaussian mechanism of multiplier σ if 1/σ² = 1/σ_g² + K/(4 σ_b²). Source: Andrew et
    al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, theorem 1, for K
    counts.

    Args:
        sigma: σ, what the accountant sees.
        groups: K.
        share: Fraction of 1/σ² that goes to the counts.

    Returns:
        σ_g, the multiplier for the gradients, and σ_b, the standard deviation for each count.
    """
    check_real("sigma", sigma, "at least 0", lambda v: v >= 0)
    check_whole("groups", groups)
    check_fraction("share", share)
    return sigma / math.sqrt(1 - share), sigma * math.sqrt(groups / (4 * share))


def _epsilon(
    kind: str, history: Sequence[tuple[Mechanism, int]], delta: float, interval: float = _FINE
) -> float:
    if not history:
        return 0.0
    if any(m.noise_multiplier == 0 for m, _ in history):
        return math.inf
    return max(0.0, float(_composed(kind, history, interval).get_epsilon(delta)))


def _composed(kind: str, history: Sequence[tuple[Mechanism, int]], interval: float) -> Any:
    from dp_accounting import pld, rdp

    if kind == "rdp":
        return _compose(rdp.RdpAccountant(), history)
    rough = _compose(rdp.RdpAccountant(_WHOLE_ORDERS), [(_plain(m), n) for m, n in history])
    # A distribution of large losses on a fine grid would not fit memory; a coarser grid is as
    # good relative to the loss, and still an upper bound.
    sigma = min(m.noise_multiplier for m, _ in history)
    spread = 0.5 / sigma**2 + 10 / sigma
    interval = max(interval, 1e-5 * min(1e6, float(rough.get_epsilon(1e-5))), 1e-6 * spread)
    return _compose(pld.PLDAccountant(value_discretization_interval=interval), history)


def _compose(accountant: Any, history: Sequence[tuple[Mechanism, int]]) -> Any:
    # The Rényi accountant warns of every order whose series does not converge, and leaves it out:
    # the others bound the loss as well.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for mechanism, steps in history:
            accountant.compose(mechanism.event(steps))
    finally:
        logger.setLevel(level)
    return accountant


def _plain(mechanism: Mechanism) -> Mechanism:
    return dataclasses.replace(
        mechanism, sampling="poisson", dataset_size=None, truncated_batch_size=None
    )


def _rdp_guess(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """A σ near the answer: Rényi accounting needs milliseconds, and is loose by tens of percent."""
    from dp_accounting import rdp

    def too_much(sigma: float) -> bool:
        step = Mechanism(noise_multiplier=sigma, sample_rate=rate)
        rough = _compose(rdp.RdpAccountant(_WHOLE_ORDERS), [(step, steps)])
        return rough.get_epsilon(delta) > epsilon

    low, high = _bracket(too_much, 1.0)
    if high > _LARGEST_SIGMA:
        return 1.0
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if too_much(middle) else (low, middle)
    return high


def _bracket(too_much: Callable[[float], bool], start: float) -> tuple[float, float]:
    """Return σ that costs too much and a larger one that does not, searching out from a guess."""
    factor = 1.05
    low = high = start
    if too_much(start):
        while high < _LARGEST_SIGMA:
            low, high, factor = high, min(high * factor, _LARGEST_SIGMA), factor * factor
            if not too_much(high):
                return low, high
        return low, math.inf
    while low > _SMALLEST_SIGMA:
        high, low = low, max(low / factor, _SMALLEST_SIGMA)
        factor = min(factor * factor, 2.0)
        if too_much(low):
            return low, high
    return low, low


def _unit(sigma: float) -> float:
    return 10.0 ** (math.floor(math.log10(sigma)) - 3)


def _decimal(digit: int, unit: float) -> float:
    return float(f"{digit * unit:.4g}")


def _entry(entry: Any) -> tuple[Mechanism, int]:
    if not isinstance(entry, dict) or "steps" not in entry:
        raise ValueError(f"expected an accountant's entry with steps, got {entry!r:.200}")
    fields = {field.name for field in dataclasses.fields(Mechanism)}
    if missing := {"noise_multiplier", "sample_rate"} - entry.keys():
        raise ValueError(f"expected an accountant's entry with {sorted(missing)}, got {entry!r}")
    if unknown := entry.keys() - fields - {"steps"}:
        raise ValueError(f"an accountant's entry has no {sorted(unknown)}")
    check_whole("steps", entry["steps"])
    return Mechanism(**{k: v for k, v in entry.items() if k != "steps"}), entry["steps"]


def mechanism_of(sigma: float, sample_rate: float | None, loader: Any) -> Mechanism:
    """Return what a step costs with a loader, or without one.

    Args:
        sigma: Noise multiplier.
        sample_rate: q, where there is no loader that knows it; None claims no amplification.
        loader: Any; one that has a ``mechanism`` is asked.

    Raises:
        PrivacyError: The rate claims amplification, and nothing says that batches are drawn so.
    """
    make = getattr(loader, "mechanism", None)
    if make is not None:
        return make(sigma)
    if sample_rate is None:
        return Mechanism(noise_multiplier=sigma, sample_rate=1.0, sampling="every_step")
    if loader is None:
        raise PrivacyError(
            f"sample_rate={sample_rate} claims amplification by Poisson sampling, and there is no "
            "Poisson loader: pass flashdp.poisson_data_loader(...), or leave sample_rate out"
        )
    raise PrivacyError(
        f"{type(loader).__name__} does not say that it draws by Poisson sampling: epsilon for "
        f"sample_rate={sample_rate} would not hold; use flashdp.poisson_data_loader"
    )
