"""What a run guarantees, in JSON for machines and in plain words for people."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels.files import write_text

from flashdp._checks import check_fraction
from flashdp.accounting import Mechanism

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashdp.engine import PrivacyEngine

JSON_NAME = "privacy_report.json"
MARKDOWN_NAME = "privacy_report.md"

OUTSIDE = (
    "losses, gradient norms, clipping rates and other telemetry of the training data, if anybody "
    "saw them",
    "the choice of hyper-parameters, if runs on the private data were compared to make it",
    "evaluation on private data, and choosing a checkpoint by it",
    "the number of units, the sample rate and the batch size, which are taken to be public",
    "the order and time in which batches were computed",
)
"""What no report of a training run can promise."""


@dataclass(frozen=True, kw_only=True)
class Covered:
    """A trained parameter and what protects it.

    Attributes:
        parameter: Its name in the model.
        rule: The rule that clips its gradient.
        group: The clipping group it belongs to.
        size: Number of elements.
    """

    parameter: str
    rule: str
    group: str
    size: int


@dataclass(frozen=True, kw_only=True)
class PrivacyReport:
    """The guarantee of a run and all that it rests on.

    Attributes:
        epsilon: ε of the steps taken.
        delta: δ.
        history: The mechanism of the steps, and for how many each was used.
        max_grad_norm: C, the bound on one unit's contribution to a step.
        thresholds: The clipping threshold of each group, at the end.
        grouping: What is clipped together.
        clipping: How.
        noise_allocation: How noise is spread over the groups.
        expected_batch_size: The public constant that sums are divided by.
        accountant: What computed ε: ``"pld"`` or ``"rdp"``.
        accountant_version: The library and its version.
        rng: Where noise and draws come from.
        secure_rng: Whether that is a cryptographic generator.
        coverage: Every trained parameter.
        user_level: Units are users with all their rows, rather than rows.
        max_rows_per_unit: Rows of a user that a step used at most.
        public_n: The number of units, where it was declared public.
        independence: What showed that no unit's data moves another unit's gradients: ``"loss"``, a
            probe of model and loss; ``"outputs"``, one of the model without the loss outside it;
            ``"not needed"``, no batch had two units; or nothing did: ``"inconclusive"``, it could
            not be seen, ``"skipped"``, ``"not recorded"``.
        outside: What the guarantee does not cover.
        notes: Further remarks.
        audit_lower_bound: What an audit found ε to be at least.
    """

    epsilon: float
    delta: float
    history: tuple[tuple[Mechanism, int], ...]
    max_grad_norm: float
    thresholds: dict[str, float]
    grouping: str
    clipping: str
    noise_allocation: str
    expected_batch_size: float
    accountant: str
    accountant_version: str
    rng: str
    secure_rng: bool
    coverage: tuple[Covered, ...]
    user_level: bool = False
    max_rows_per_unit: int | None = None
    public_n: int | None = None
    independence: str = "not recorded"
    outside: tuple[str, ...] = OUTSIDE
    notes: tuple[str, ...] = ()
    audit_lower_bound: float | None = None

    def __post_init__(self) -> None:
        """Check the two numbers that everything is about."""
        if not isinstance(self.epsilon, (int, float)) or not self.epsilon >= 0:
            raise ValueError(f"epsilon: expected a number of at least 0, got {self.epsilon!r}")
        check_fraction("delta", self.delta)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return sum(steps for _, steps in self.history)

    @property
    def unit(self) -> str:
        """Who is protected."""
        if self.user_level:
            return "one user, with all rows of the training data that carry the user's id"
        return "one row of the training data"

    @property
    def neighbouring(self) -> str:
        """Which data sets are indistinguishable."""
        what = "one user's rows" if self.user_level else "one row"
        if any(m.sampling == "every_step" for m, _ in self.history):
            return (
                f"{what} being left out of every step, all batches staying as they are (batches "
                "were not drawn at random)"
            )
        return f"adding or removing {what}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must not overlook."""
        mechanisms = [m for m, _ in self.history]
        found = (
            (math.isinf(self.epsilon), "epsilon is infinite: this run gives no privacy"),
            (
                any(m.noise_multiplier == 0 for m in mechanisms),
                "some steps added no noise",
            ),
            (
                10 < self.epsilon < math.inf,
                f"epsilon is {self.epsilon:.3g}: beyond 10 the guarantee by itself says little",
            ),
            (
                self.public_n is not None and self.delta * self.public_n >= 1,
                f"delta is {self.delta:g}, at least one over the number of units: publishing some "
                "units outright would satisfy it",
            ),
            (
                self.public_n is None,
                "no public number of units was given to compare delta with",
            ),
            (
                not self.secure_rng,
                "the random numbers can be repeated from a seed and are not cryptographic: who "
                "knows the seed can take the noise away",
            ),
            (
                any(m.sampling == "every_step" for m in mechanisms),
                "batches were not drawn at random: no amplification by sampling is claimed",
            ),
            (
                self.independence not in _INDEPENDENT,
                "that units do not move one another's gradients was not checked "
                f"({self.independence}): if they do, clipping bounds nothing",
            ),
            (not self.coverage, "the coverage list is empty"),
            (
                self.audit_lower_bound is not None and self.audit_lower_bound > self.epsilon,
                f"an audit found {self.audit_lower_bound}, which is above epsilon: the guarantee "
                "does not hold",
            ),
        )
        return tuple(text for applies, text in found if applies)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; an infinite ε is the string ``"inf"``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["epsilon"] = _finite(self.epsilon)
        fields["history"] = [{**dataclasses.asdict(m), "steps": n} for m, n in self.history]
        fields["coverage"] = [dataclasses.asdict(c) for c in self.coverage]
        fields["outside"], fields["notes"] = list(self.outside), list(self.notes)
        derived = {name: getattr(self, name) for name in _DERIVED}
        return {"version": 1, **fields, **derived, "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Any) -> PrivacyReport:
        """Make a report from what `to_dict` returned.

        Raises:
            ValueError: It is not a report of version 1, a field is missing, unknown or refused.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected a report, got {values!r:.80}")
        if values.get("version") != 1:
            raise ValueError(f"expected a report of version 1, got {values.get('version')!r}")
        given = {k: v for k, v in values.items() if k not in ("version", "warnings", *_DERIVED)}
        try:
            given["epsilon"] = float(given["epsilon"])
            given["history"] = tuple(
                (Mechanism(**{k: v for k, v in entry.items() if k != "steps"}), entry["steps"])
                for entry in given["history"]
            )
            given["coverage"] = tuple(Covered(**entry) for entry in given["coverage"])
            for name in ("outside", "notes"):
                given[name] = tuple(given[name])
            return cls(**given)
        except (KeyError, TypeError, AttributeError) as error:
            fields = {f.name for f in dataclasses.fields(cls)}
            odd = sorted(given.keys() - fields) or sorted(fields - given.keys()) or error
            raise ValueError(f"the report's fields are not those of version 1: {odd}") from error

    def to_markdown(self) -> str:
        """Return the report in plain words."""
        lines = [
            "# Privacy report",
            "",
            f"The trained weights are differentially private: ε = {_number(self.epsilon)} at "
            f"δ = {_number(self.delta)}.",
            "",
            f"- Protected: {self.unit}.",
            f"- Neighbouring data sets differ by {self.neighbouring}.",
            "",
        ]
        if self.warnings:
            lines += ["## Warnings", "", *_items(self.warnings)]
        lines += ["## What was done", ""]
        for mechanism, steps in self.history:
            lines.append(f"- {_step(mechanism, steps)}")
        lines += [
            f"- One unit contributes at most C = {_number(self.max_grad_norm)} to a step; clipped "
            f"by {self.grouping}, {self.clipping} clipping; noise: {self.noise_allocation}.",
            f"- Sums are divided by the public constant {_number(self.expected_batch_size)}.",
            f"- Accountant: {self.accountant}, {self.accountant_version}.",
            f"- Random numbers: {self.rng}.",
        ]
        if self.independence in _INDEPENDENT:
            lines.append(f"- {_INDEPENDENT[self.independence]}")
        if self.max_rows_per_unit is not None:
            lines.append(f"- A step uses at most {self.max_rows_per_unit} rows of a user.")
        if self.public_n is not None:
            lines.append(f"- The number of units, {self.public_n}, is treated as public.")
        if self.audit_lower_bound is not None:
            bound = _number(self.audit_lower_bound)
            lines.append(f"- An audit found that ε is at least {bound}.")
        lines += [f"- {note}" for note in self.notes]
        lines += ["", "## Outside the guarantee", "", *_items(self.outside)]
        if self.coverage:
            lines += _table(
                "Trained parameters, all of them clipped and noised",
                ("parameter", "rule", "group", "elements"),
                [(c.parameter, c.rule, c.group, str(c.size)) for c in self.coverage],
            )
        if self.thresholds:
            lines += _table(
                "Clipping thresholds",
                ("group", "threshold"),
                [(name, _number(value)) for name, value in self.thresholds.items()],
            )
        return "\n".join(lines).rstrip() + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write the report as JSON and markdown; a file is replaced whole or not at all.

        Args:
            folder: Made if it does not exist.

        Returns:
            The JSON file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_text(folder / MARKDOWN_NAME, self.to_markdown())
        write_text(folder / JSON_NAME, text)
        return folder / JSON_NAME

    @classmethod
    def load(cls, path: str | Path) -> PrivacyReport:
        """Read a report.

        Args:
            path: The file ``privacy_report.json``, or the folder it lies in.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged; the message names the file.
        """
        path = Path(path)
        if path.name != JSON_NAME:
            path = path / JSON_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no privacy report: {path} does not exist")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def report_of(
    engine: PrivacyEngine, delta: float, *, public_n: int | None = None, notes: Sequence[str] = ()
) -> PrivacyReport:
    """Return what the steps that an engine has taken guarantee, also after it was detached.

    Args:
        engine: The engine.
        delta: δ of the guarantee.
        public_n: The number of units, if it is public.
        notes: Remarks to add.
    """
    calibration, loader, secure = engine.calibration, engine._loader, engine.noise.secure
    groups = calibration.groups
    return PrivacyReport(
        epsilon=engine.get_epsilon(delta),
        delta=delta,
        history=engine.accountant.history,
        max_grad_norm=calibration.sensitivity,
        thresholds=dict(
            zip((group.name for group in groups), calibration.thresholds.tolist(), strict=True)
        ),
        grouping=engine.grouping,
        clipping=engine.clipping,
        noise_allocation=calibration.allocation,
        expected_batch_size=engine.expected_batch_size,
        accountant=engine.accountant.kind,
        accountant_version=engine.accountant.version,
        rng="ChaCha20 with a key of the operating system" if secure else "ChaCha20 from a seed",
        secure_rng=secure,
        coverage=tuple(
            Covered(
                parameter=part.layer.names[local],
                rule=part.layer.rule,
                group=group.name,
                size=part.layer.parameter(local).numel(),
            )
            for group in groups
            for part in group.parts
            for local in part.names
        ),
        user_level=getattr(loader, "user_level", False),
        max_rows_per_unit=getattr(loader, "max_rows_per_unit", None),
        independence=engine.independence.status,
        public_n=engine.mechanism.dataset_size if public_n is None else public_n,
        notes=tuple(notes),
    )


_INDEPENDENT = {
    "loss": "On a batch, other units' data was replaced and no unit's gradient moved.",
    "outputs": "On a batch, other units' data was replaced and no unit's gradient moved; the loss, "
    "which is computed outside the model, has to be a sum over units.",
    "not needed": "No batch held two units, so none could move another's gradient.",
}
_DERIVED = ("unit", "neighbouring", "steps")


def _step(mechanism: Mechanism, steps: int) -> str:
    sigma = _number(mechanism.noise_multiplier)
    noise = f"Gaussian noise of multiplier {sigma}"
    if mechanism.sampling == "every_step":
        return f"{steps} steps with {noise}, any unit possibly in all of them."
    drawn = f"Poisson sampling, each unit with probability {_number(mechanism.sample_rate)}"
    if mechanism.sampling == "truncated":
        drawn += f", at most {mechanism.truncated_batch_size} units"
    return f"{steps} steps with {noise} on batches drawn by {drawn}."


def _items(texts: tuple[str, ...]) -> list[str]:
    return [*(f"- {text}" for text in texts), ""]


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [f"## {title}", "", _row(columns), _row(("---",) * len(columns))]
    return [*lines, *(_row(tuple(map(_cell, row))) for row in rows), ""]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
