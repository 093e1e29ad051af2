"""What a private run promises and how: the budget, clipping, sampling, accounting.

A plain frozen dataclass, checked when it is made, convertible to and from JSON. This module imports
neither torch nor numpy, because the command line reads it to print its help.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Grouping = Literal["param", "module", "block", "flat"]
Clipping = Literal["abadi", "automatic"]
NoiseAllocation = Literal["global", "equal_budget", "dimension"]
Thresholds = Literal["fixed", "adaptive"]
AccountantKind = Literal["pld", "rdp"]
Adjacency = Literal["add_remove"]


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """A differentially private run.

    Args:
        target_epsilon: ε to reach after the planned steps; the noise follows from it. Give either
            this or ``noise_multiplier``.
        target_delta: δ of the guarantee; below one over the number of units, 1/(10 N) is usual.
            State it as a public number, not as a function of the private data.
        noise_multiplier: σ, the noise's standard deviation relative to the sensitivity.
        max_grad_norm: C, the bound on the norm of one unit's whole contribution; clipping groups
            share it so that the squares of their thresholds add up to C².
        expected_batch_size: B, the public constant by which sums are divided: the expected number
            of units per step. Never taken from the realised batch or the data set.
        sample_rate: q, the probability with which each unit enters a step. ``None`` takes
            B / (number of units), which treats the number of units as public.
        grouping: What is clipped together: single parameters, modules (weight and bias),
            transformer blocks, or everything.
        clipping: ``"abadi"`` scales by min(1, C/n), ``"automatic"`` by C/(n + stability).
        stability: γ of automatic clipping.
        noise_allocation: How noise is spread over groups: the same on every coordinate, the same
            budget for every group, or weighted by the groups' dimensions.
        thresholds: Thresholds stay as they are, or follow a quantile of the norms, estimated
            privately out of the same budget.
        quantile: The fraction of units whose norm an adaptive threshold leaves unclipped.
        eta: Step of an adaptive threshold, in the exponent.
        share: Fraction of the budget (of σ⁻²) that the adaptive thresholds' counts may use.
        accountant: ``"pld"`` (privacy loss distributions, tight) or ``"rdp"`` (Rényi, looser).
        adjacency: What neighbouring data sets are: one unit added or removed.
        max_batch_size: A draw of more units than this is cut to a random subset of this size,
            and accounted so. ``None`` keeps every drawn unit.
        max_physical_batch_size: Rows computed at once; ``None`` computes a whole draw at once.
        secure_rng: Draw noise and batches from the operating system's cryptographic generator.
        seed: Makes a run repeatable; only with ``secure_rng=False``, and not for a release.
        unit_ids_key: Column that says whose row it is: the guarantee is then for all rows of one
            user. ``None`` protects single rows.
        max_rows_per_unit: Rows of one user that a step uses, at most.
        check_independence: Probe the first batch for units that move each other's gradients; the
            report says if that was left out.
    """

    target_epsilon: float | None = None
    target_delta: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    expected_batch_size: float
    sample_rate: float | None = None
    grouping: Grouping = "module"
    clipping: Clipping = "abadi"
    stability: float = 0.01
    noise_allocation: NoiseAllocation = "global"
    thresholds: Thresholds = "fixed"
    quantile: float = 0.5
    eta: float = 0.2
    share: float = 0.01
    accountant: AccountantKind = "pld"
    adjacency: Adjacency = "add_remove"
    max_batch_size: int | None = None
    max_physical_batch_size: int | None = None
    secure_rng: bool = True
    seed: int | None = None
    unit_ids_key: str | None = None
    max_rows_per_unit: int | None = None
    check_independence: bool = True

    def __post_init__(self) -> None:
        """Check every field and what they say together."""
        self._check_budget()
        positive, above = "a finite number above 0", lambda v: v > 0
        fraction, inside = "a number between 0 and 1, both excluded", lambda v: 0 < v < 1
        self._real("max_grad_norm", positive, "0.1 to 1 is usual", above)
        self._real("expected_batch_size", positive, "256 to 4096 is usual", above)
        self._real(
            "sample_rate",
            "None or a number above 0, at most 1",
            "it is the probability that a unit enters a step",
            lambda v: 0 < v <= 1,
        )
        for name in ("grouping", "clipping", "noise_allocation", "thresholds"):
            self._choice(name)
        self._choice("accountant")
        self._choice("adjacency")
        self._real("stability", positive, "0.01 is usual", above)
        self._real("quantile", fraction, "0.5 clips at the median norm", inside)
        self._real("eta", positive, "0.2 is usual", above)
        self._real("share", fraction, "0.01 spends a hundredth of the budget", inside)
        for name, remedy in (
            ("max_batch_size", "None keeps every drawn unit"),
            ("max_physical_batch_size", "None computes a draw at once"),
            ("max_rows_per_unit", "None uses all rows of a user"),
        ):
            self._whole(name, "None or a whole number of at least 1", remedy, lambda v: v >= 1)
        if self.max_batch_size is not None and self.max_batch_size < self.expected_batch_size:
            raise self._error(
                "max_batch_size",
                f"at least expected_batch_size, which is {self.expected_batch_size:g}",
                "a smaller one would cut most draws",
            )
        self._check_seed()
        self._check_units()
        if not isinstance(self.check_independence, bool):
            raise self._error("check_independence", "true or false", "give a boolean", TypeError)
        if self.thresholds == "adaptive" and self.clipping != "abadi":
            raise self._error(
                "thresholds",
                f"'fixed' with clipping={self.clipping!r}, which has no units below a threshold",
                "use clipping='abadi' or thresholds='fixed'",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivacyArguments:
        """Make the arguments from what `to_dict` returned, or from a parsed YAML or JSON file.

        Args:
            values: Field names and their values; absent fields take their defaults.

        Raises:
            ValueError: A key is not a field (the nearest field is suggested), or a value is
                refused by the field's check.
            TypeError: ``values`` is not a mapping, or a value has the wrong type.
        """
        if not isinstance(values, dict):
            raise TypeError(f"{cls.__name__}: expected a mapping of options, got {values!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"{cls.__name__} has no option {key!r}{hint}; it has: {', '.join(names)}"
                )
        return cls(**values)

    def replace(self, **changes: Any) -> PrivacyArguments:
        """Return a copy with some fields changed; the copy is checked again."""
        return dataclasses.replace(self, **changes)

    def _check_budget(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "PrivacyArguments: expected exactly one of target_epsilon and noise_multiplier, "
                f"got {self.target_epsilon!r} and {self.noise_multiplier!r}; "
                "the noise follows from the former, ε from the latter"
            )
        self._real("target_epsilon", "a finite number above 0", "1 to 10 is usual", lambda v: v > 0)
        self._real(
            "noise_multiplier",
            "a finite number of at least 0",
            "0 adds no noise and gives no privacy",
            lambda v: v >= 0,
        )
        self._real(
            "target_delta",
            "a number between 0 and 1, both excluded",
            "it has to be far below the chance of exposing one unit by itself: choose it so that "
            "times the number of units it stands for fewer than one unit, 1/(10 N) is usual",
            lambda v: 0 < v < 1,
        )
        if self.target_epsilon is not None and self.target_delta is None:
            raise self._error(
                "target_delta",
                "a number between 0 and 1 beside target_epsilon",
                "1/(10 N) is usual, N a public count of units",
            )

    def _check_seed(self) -> None:
        if not isinstance(self.secure_rng, bool):
            raise self._error("secure_rng", "true or false", "give a boolean", TypeError)
        if self.secure_rng and self.seed is not None:
            raise self._error(
                "seed", "None with secure_rng=True", "for a repeatable run use secure_rng=False"
            )
        if not self.secure_rng and self.seed is None:
            raise self._error("seed", "a seed with secure_rng=False", "0 is fine")
        self._whole("seed", "a whole number in [0, 2**64)", "0 is fine", lambda v: 0 <= v < 2**64)

    def _check_units(self) -> None:
        key = self.unit_ids_key
        if key is not None and not isinstance(key, str):
            raise self._error("unit_ids_key", "a column's name", "None protects rows", TypeError)
        if key == "":
            raise self._error("unit_ids_key", "a column's name", "None protects rows")
        if key is None and self.max_rows_per_unit is not None:
            raise self._error("max_rows_per_unit", "None without users", "give unit_ids_key too")

    def _error(
        self, name: str, expected: str, remedy: str, kind: type[Exception] = ValueError
    ) -> Exception:
        value = getattr(self, name)
        return kind(f"PrivacyArguments.{name}: expected {expected}, got {value!r}; {remedy}")

    def _real(self, name: str, expected: str, remedy: str, ok: Callable[[Any], bool]) -> None:
        self._number(name, expected, remedy, ok, (int, float))
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, float(value))

    def _whole(self, name: str, expected: str, remedy: str, ok: Callable[[Any], bool]) -> None:
        self._number(name, expected, remedy, ok, (int,))

    def _number(
        self, name: str, expected: str, remedy: str, ok: Callable[[Any], bool], kinds: tuple
    ) -> None:
        value = getattr(self, name)
        if value is None and _default(name) is None:
            return
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise self._error(name, expected, remedy, TypeError)
        if not math.isfinite(value) or not ok(value):
            raise self._error(name, expected, remedy)

    def _choice(self, name: str) -> None:
        options = typing.get_args(_CHOICES[name])
        if getattr(self, name) not in options:
            listed = ", ".join(repr(option) for option in options)
            raise self._error(name, f"one of {listed}", "choose one of them")


_CHOICES = {
    "grouping": Grouping,
    "clipping": Clipping,
    "noise_allocation": NoiseAllocation,
    "thresholds": Thresholds,
    "accountant": AccountantKind,
    "adjacency": Adjacency,
}


def _default(name: str) -> Any:
    return {field.name: field.default for field in dataclasses.fields(PrivacyArguments)}[name]
