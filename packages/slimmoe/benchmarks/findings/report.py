"""The table of findings: differences of paired arms, with intervals."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file
from scipy import stats
from shared_kernels.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Ends = tuple[float, float] | tuple[None, None]
_RESAMPLES = 4000
_BEGIN, _END = "<!-- findings -->", "<!-- /findings -->"
_METHODS = ("prune", "merge", "partial_merge")
_IMPORTANCES = ("freq", "soft", "reap")


@dataclass(frozen=True)
class Row:
    """A finding.

    Attributes:
        finding: Of arXiv:2605.08738, F1 to F5.
        compared: What is compared with what.
        measure: Of it; a loss is in nats per token.
        value: Mean over seeds.
        low: Of a 95 % interval by a bootstrap over seeds, and within them over blocks or questions;
            None of one number of one seed.
        high: Of the same.
        t_low: Of a 95 % interval by Student's t over seeds, which knows nothing of blocks; None of
            one seed.
        t_high: Of the same.
        seeds: Of each seed.
        paper: The sign in the paper: -1, 1, or 0 where it tells none apart.
    """

    finding: str
    compared: str
    measure: str
    value: float
    low: float | None
    high: float | None
    t_low: float | None
    t_high: float | None
    seeds: tuple[float, ...]
    paper: int


class Runs:
    """What `arms.run_arm` wrote, of the seeds that all wanted arms have.

    Args:
        folder: Of records.
    """

    def __init__(self, folder: str | Path) -> None:
        self._records, self._items = {}, {}
        for path in sorted(Path(folder).glob("*-[0-9].safetensors")):
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            key = record["arm"], record["seed"]
            self._records[key] = record
            self._items[key] = load_file(path)

    def seeds(self, *arms: str) -> list[int]:
        """Return seeds that all these arms have."""
        sets = [{seed for arm, seed in self._records if arm == name} for name in arms]
        return sorted(set.intersection(*sets)) if sets else []

    def numbers(self, arm: str, measure: str, seeds: Sequence[int]) -> np.ndarray:
        """Return ``(seeds, items)``: of blocks or questions, or one number of a run."""
        found = []
        for seed in seeds:
            items = self._items[arm, seed]
            value = items.get("losses" if measure == "loss" else measure)
            single = self._records[arm, seed].get(measure)
            found.append(np.atleast_1d(single if value is None else value).astype(float))
        return np.stack(found)

    def record(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the record of a run."""
        return self._records[arm, seed]

    def means(self) -> dict[str, dict[str, float]]:
        """Return means over seeds of all numbers, by arm."""
        found: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(arm for arm, _ in self._records):
            seeds = self.seeds(name)
            records = [self._records[name, seed] for seed in seeds]
            keys = [k for k, v in records[0].items() if isinstance(v, float)]
            found[name] = {k: float(np.mean([r[k] for r in records])) for k in keys}
            found[name]["runs"] = len(seeds)
        return found


def resampled(
    function: Callable[[np.ndarray, np.ndarray], float], seeds: int, items: int
) -> tuple[float, float]:
    """Return a 95 % interval of a function of which seeds and which items are looked at."""
    draws = np.random.default_rng(0)
    found = [
        function(draws.integers(0, seeds, seeds), draws.integers(0, items, items))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def difference(
    runs: Runs, finding: str, compared: str, measure: str, ones: Sequence[str],
    others: Sequence[str], paper: int,
) -> Row | None:  # fmt: skip
    """Return by how much the mean of some arms differs from that of others; None without runs."""
    seeds = runs.seeds(*ones, *others)
    if not seeds:
        return None
    both = [
        np.mean([runs.numbers(arm, measure, seeds) for arm in arms], 0) for arms in (ones, others)
    ]
    paired = both[0] - both[1]
    each = paired.mean(1)
    ends = (None, None)
    if paired.size > 1:
        ends = resampled(lambda s, i: paired[s][:, i].mean(), *paired.shape)
    return _row(finding, compared, measure, each, ends, paper)


def _row(
    finding: str, compared: str, measure: str, each: np.ndarray, ends: Ends, paper: int
) -> Row:
    """Return a finding of one number of each seed, and the ends of the interval that is known."""
    mean, over_seeds = float(each.mean()), (None, None)
    if len(each) > 1:
        wide = float(stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5)
        over_seeds = mean - wide, mean + wide
    return Row(
        finding, compared, measure, mean, *ends, *over_seeds, tuple(map(float, each)), paper
    )  # fmt: skip


def _spread(runs: Runs) -> list[Row]:
    """Return how far the nine ways to fewer experts are apart, at the begin and at the end."""
    names = [_name(i, m) for i in _IMPORTANCES for m in _METHODS]
    seeds = runs.seeds(*names)
    if not seeds:
        return []
    found = []
    values = {
        measure: np.stack([runs.numbers(name, measure, seeds) for name in names])
        for measure in ("first", "loss")
    }

    def apart(measure: str, s: np.ndarray, i: np.ndarray) -> float:
        means = values[measure][:, s][:, :, i].mean((1, 2))
        return float(means.max() - means.min())

    counts = values["loss"].shape[1:]
    for measure, told in (("first", "before training"), ("loss", "after training")):
        each = np.array([apart(measure, np.array([s]), np.arange(counts[1])) for s in
                         range(counts[0])])  # fmt: skip
        ends = resampled(lambda s, i, m=measure: apart(m, s, i), *counts)
        compared = f"largest less smallest of nine, {told}"
        found.append(_row("F2", compared, "loss", each, ends, 0))
    return found


def _name(importance: str, method: str) -> str:
    return "base" if (importance, method) == ("soft", "partial_merge") else f"{importance}-{method}"


def findings(runs: Runs) -> list[Row]:
    """Return all rows for which there are runs of two seeds."""
    by_method = {m: [_name(i, m) for i in _IMPORTANCES] for m in _METHODS}
    wanted = [
        ("F1", "pruned and distilled - random and distilled", "loss", ["base"], ["random"], -1),
        ("F1", "distilled - language model loss alone, both pruned", "loss", ["base"],
         ["pruned-lm"], -1),
        *[("F3", f"partial merge - {other}, mean of three importances", measure,
           by_method["partial_merge"], by_method[other], sign)
          for other in ("merge", "prune")
          for measure, sign in (("loss", -1), ("knowledge", 1))],
        *[("F4", f"KD + LM (to 0.75) - lambda to {end}", measure, ["base"], [f"kd-to-{end}"], sign)
          for end in ("1", "0.5", "0")
          for measure, sign in (("loss", -1 if end == "1" else 0),
                                ("knowledge", 1 if end == "1" else 0))],
        ("F4", "with MTP distillation - without MTP", "loss", ["base"], ["no-mtp"], -1),
        *[("F4", "MTP distilled - MTP by its labels", f"acc_{n}", ["base"], ["mtp-lm"], 1)
          for n in (1, 2, 3, 4)],
        ("F4", "MTP distilled - MTP by its labels", "accepted_length", ["base"], ["mtp-lm"], 1),
        *[("F5", f"{name} - one shot", measure, [name], ["base"], sign)
          for name in ("depth_first", "width_first", "joint")
          for measure, sign in (("loss", -1), ("knowledge", 1))],
    ]  # fmt: skip
    rows = [difference(runs, *row) for row in wanted]
    found = [row for row in rows if row is not None] + _spread(runs)
    return sorted(found, key=lambda row: row.finding)


def tokens_to_reach(runs: Runs, arm: str, other: str) -> dict[str, float]:
    """Return the share of tokens after which an arm's curve is where another's ends, by seed."""
    found = {}
    for seed in runs.seeds(arm, other):
        goal = runs.record(other, seed)["curve"][-1][1]
        curve = runs.record(arm, seed)["curve"]
        reached = [tokens for tokens, loss in curve if loss <= goal]
        found[str(seed)] = reached[0] / curve[-1][0] if reached else float("inf")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    lines = [
        "| finding | compared | measure | seeds | difference | 95 %, seeds and items"
        " | 95 %, t over seeds | in the paper |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    signs = {-1: "below 0", 0: "-", 1: "above 0"}
    for row in rows:
        own, ends = _interval(row.low, row.high), _interval(row.t_low, row.t_high)
        lines.append(
            f"| {row.finding} | {row.compared} | {row.measure} | {len(row.seeds)} "
            f"| {row.value:+.4f} | {own} | {ends} "
            f"| {signs[row.paper]} |"
        )
    return "\n".join(lines) + "\n"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"{low:+.4f} to {high:+.4f}"


def fill(readme: str | Path, told: dict[str, Any]) -> None:
    """Put the tables of findings and of means between the marks of a README.

    Args:
        readme: With ``<!-- findings -->`` and ``<!-- /findings -->``.
        told: Of `record`.

    Raises:
        ValueError: There are no such marks.
    """
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not found or not ended:
        raise ValueError(f"{path}: expected {_BEGIN} and {_END}, to put tables between")
    write_text(path, f"{before}{_BEGIN}\n{shown(told)}{_END}{after}")


def shown(told: dict[str, Any]) -> str:
    """Return what `fill` puts there."""
    rows = [Row(**{**row, "seeds": tuple(row["seeds"])}) for row in told["findings"]]
    names = {"first_loss": "loss at first", "loss": "loss", "knowledge": "words",
             "code": "lines of code", "acc_1": "acc_1", "acc_2": "acc_2", "acc_4": "acc_4",
             "accepted_length": "accepted"}  # fmt: skip
    lines = [f"| arm | runs | {' | '.join(names.values())} |", "|---|" + "--:|" * (len(names) + 1)]
    for arm, means in {**told["teachers"], **told["means"]}.items():
        cells = [f"{means[key]:.4f}" if key in means else "-" for key in names]
        lines.append(f"| {arm} | {means.get('runs', '-')} | {' | '.join(cells)} |")
    machines = []
    for told_of in told["environments"].values():
        made = told_of["versions"]
        machines.append(
            f"{told_of['gpu']['name']}; torch {made['torch']}, transformers "
            f"{made['transformers']}; commit {told_of['commit'][:12]}"
            f"{' and changes' if told_of['dirty'] else ''}; {told_of['date'][:10]}"
        )
    return f"{markdown(rows)}\n" + "\n".join(lines) + f"\n\n{'. '.join(machines)}.\n"


def record(folder: str | Path) -> dict[str, Any]:
    """Return all that goes into the result file, of a folder with records."""
    runs, folder = Runs(folder), Path(folder)

    def told(pattern: str) -> dict[str, Any]:
        return {path.stem: json.loads(path.read_text(encoding="utf-8"))
                for path in sorted(folder.glob(pattern))}  # fmt: skip

    return {
        "environments": told("environment-*.json"),
        "teachers": told("teacher-*.json"),
        "findings": [asdict(row) for row in findings(runs)],
        "tokens to reach random's end, as a share": tokens_to_reach(runs, "base", "random"),
        "means": runs.means(),
    }
