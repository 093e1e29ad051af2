"""Decode steps over the least possible, with forelen's predictions of real answers.

``python packages/infsampling/benchmarks/lengths.py STORE OUT.json``: STORE is a folder that
``forelen collect`` wrote. A training step is 8 prompts with all their answers, on half as many
slots as answers; `simulate` counts its steps, which are those of the sampler. Cross-validation over
prompts: predictors never saw a prompt whose answers they put in order. The number that is told of a
distribution (its mean, or a quantile) is chosen for each policy and fold on prompts of the other
folds, which chose the epoch of the predictor too: rows named ``chosen``. All numbers are steps over
``max(longest, ceil(sum / slots))``, which is reached by swaps alone: ``over_unswapped`` are those
over the bound of a schedule without, which knows that two of the longest must share a slot.

- ``nothing``: all answers are believed to reach the cap, as without a predictor: who had the
  fewest steps goes on first;
- ``prompt``: the prediction before the answer begins;
- ``survival``: the same distribution, given that the answer is longer than it is by now;
- ``PLP``: by the answer's own states too, if the store has them (``forelen collect`` keeps them;
  stores in the repository come without). ``lpt`` orders by these two after a probe of 16 steps,
  ``lrpt/64`` ranks every 64 steps and ``lrpt/16`` every 16;
- ``true lengths``, and ``true lengths, error s``: multiplied by exp(s z), z standard normal, which
  says how good predictions have to be. ``log_errors`` are those of forelen's means: the standard
  deviation of the logarithm of length over prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from forelen.dataset import LengthDataset
from forelen.distribution import LengthDistribution
from forelen.store import FeatureStore
from forelen.training import default_arguments, predict_rows, train
from infsampling import simulate
from infsampling.scheduling import parking
from infsampling.scheduling.bounds import lower_bound, preemptive_bound
from shared_kernels.bench import describe_run
from shared_kernels.files import write_text

EPOCHS, FOLDS, PROMPTS, PROBE, EVERY = 6, 5, 8, 16, (64, 16)
LEVELS = (None, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
ERRORS = (0.2, 0.5, 1.0)
#: How often the prompts of a fold are dealt to steps anew.
DEALS = 3


def fitted(found, validation, **settings):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = {
            "num_train_epochs": EPOCHS, "weight_decay": 0.1, "disable_tqdm": True,
            "logging_strategy": "no", "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        return train(
            found, output_dir=folder, validation=validation, dropout=0.3,
            arguments=default_arguments(folder, True, **options), **settings,
        )  # fmt: skip


def told(law, level, most):
    """Return what is said of a distribution of tokens to come, as steps."""
    found = law.mean() if level is None else law.quantile(level)
    return (found - 1).clamp(torch.ones(()), torch.as_tensor(most)).numpy()


class Beliefs:
    """Steps that answers are believed to need at some ages, for every level: ``(N, ages)``."""

    def __init__(self, ages, values):
        self.ages, self.values = np.asarray(ages), values

    @classmethod
    def surviving(cls, law, cap):
        bins, ages = law.bins, list(range(0, cap, PROBE))
        values = {level: [] for level in LEVELS}
        for age in ages:
            pmf = law.pmf if not age else bins.remaining(law.pmf, torch.full((len(law),), age))
            now = LengthDistribution(pmf, bins)
            for level, columns in values.items():
                columns.append(told(now, level, max(1, cap - 1 - age)))
        return cls(ages, {level: np.stack(columns, 1) for level, columns in values.items()})

    @classmethod
    def growing(cls, predictor, rows, count, cap):
        ages = rows.time.unique().tolist()
        values = {level: np.full((count, len(ages)), np.nan) for level in LEVELS}
        for place, age in enumerate(ages):
            chosen = (rows.time == age).nonzero()[:, 0]
            predictor.config.calibration = {}
            law = predict_rows(predictor, rows, chosen=chosen)
            for level, table in values.items():
                table[rows.sample[chosen].numpy(), place] = told(law, level, max(1, cap - 1 - age))
        return cls(ages, values)

    def of(self, level, chosen):
        """Return what `simulate` asks for, of chosen answers."""
        table = self.values[level][chosen]

        def remaining(row, done):
            place = int(np.searchsorted(self.ages, done, side="right")) - 1
            # an age that was not kept of this answer: it ended there
            while np.isnan(table[row, place]):
                place -= 1
            return parking.left(float(table[row, place]), done - int(self.ages[place]))

        return remaining


def deal(prompts, siblings, draws):
    """Return the answers of each training step."""
    order = draws.permutation(prompts)
    parts = [order[low : low + PROMPTS] for low in range(0, prompts - PROMPTS + 1, PROMPTS)]
    return [(part[:, None] * siblings + np.arange(siblings)).ravel() for part in parts]


def contenders(beliefs, first, cap, blurred):
    """Return by (name, level) what `simulate` is given, of chosen answers."""
    found = {
        ("fifo", None): lambda _: {"policy": "fifo"},
        ("turns, 64", None): lambda _: {"policy": "turns", "turn": 64},
        ("turns, 16", None): lambda _: {"policy": "turns", "turn": 16, "rerank_every": 16},
    }
    for every in EVERY:
        name = f"lrpt/{every}"
        found[f"{name}, nothing", None] = lambda chosen, every=every: {
            "policy": "lrpt", "rerank_every": every, "predictions": np.full(len(chosen), cap - 1.0),
        }  # fmt: skip
        found[f"{name}, true lengths", None] = lambda _, every=every: {
            "policy": "lrpt", "rerank_every": every,
        }  # fmt: skip
    found["lpt, true lengths", None] = lambda _: {"policy": "lpt"}
    for error, guess in blurred.items():
        for policy in ("lpt", "lrpt"):
            name = f"{policy}/64" if policy == "lrpt" else policy
            found[f"{name}, true lengths, error {error}", None] = (
                lambda chosen, policy=policy, guess=guess: {
                    "policy": policy, "predictions": guess[chosen],
                }
            )  # fmt: skip
    for level in LEVELS:
        for policy in ("lpt",) if level else ("lpt", "sjf", "paper"):
            found[f"{policy}, prompt", level] = lambda chosen, policy=policy, level=level: {
                "policy": policy, "predictions": first[level][chosen],
            }  # fmt: skip
        for name, table in beliefs.items():
            found[f"lpt, {name}", level] = lambda chosen, level=level, table=table: {
                "policy": "lpt", "probe": PROBE, "predictions": first[level][chosen],
                "remaining": table.of(level, chosen),
            }  # fmt: skip
            for every in EVERY:
                found[f"lrpt/{every}, {name}", level] = (
                    lambda chosen, every=every, level=level, table=table: {
                        "policy": "lrpt", "rerank_every": every,
                        "predictions": first[level][chosen], "remaining": table.of(level, chosen),
                    }
                )  # fmt: skip
    return found


def judged(part, predictors, deals, seed):
    """Return steps over the bound and swaps of every contender, ``(training steps, 3)``."""
    siblings = part.lengths.shape[1]
    cap = part.header["sampling"]["max_new_tokens"]
    work = part.lengths.flatten().numpy() - 1
    rows = LengthDataset(part, predictors["prompt"].config)
    law = predict_rows(predictors["prompt"], rows)
    beliefs = {"survival": Beliefs.surviving(law, cap)}
    if "PLP" in predictors:
        grown = LengthDataset(part, predictors["PLP"].config)
        beliefs["PLP"] = Beliefs.growing(predictors["PLP"], grown, len(work), cap)
    first = {level: told(law, level, cap - 1) for level in LEVELS}
    draws = np.random.default_rng(seed)
    blurred = {
        error: np.clip(work * np.exp(error * draws.standard_normal(len(work))), 1, cap - 1)
        for error in ERRORS
    }
    arms = contenders(beliefs, first, cap, blurred)
    found = {key: [] for key in arms}
    for _ in range(deals):
        for chosen in deal(len(part), siblings, draws):
            lengths, slots = work[chosen], len(chosen) // 2
            bound, unswapped = preemptive_bound(lengths, slots), lower_bound(lengths, slots)
            for key, options in arms.items():
                result = simulate(lengths, slots, **options(chosen))
                swaps = result.swaps / len(chosen)
                found[key].append((result.steps / bound, result.steps / unswapped, swaps))
    errors = {"prompt": np.log(np.maximum(work, 1) / first[None])}
    for name, table in beliefs.items():
        place = int(np.searchsorted(table.ages, PROBE))
        there = ~np.isnan(table.values[None][:, place]) & (work > PROBE)
        errors[f"{name}, of what remains after {PROBE}"] = np.log(
            (work[there] - PROBE) / table.values[None][there, place]
        )
    return (
        {key: np.array(values) for key, values in found.items()},
        {name: float(values.std()) for name, values in errors.items()},
    )


def summary(values):
    """Return the mean over training steps, and an interval over them."""
    over, unswapped, swaps = values.T
    draws = np.random.default_rng(0).integers(0, len(over), (1000, len(over)))
    means = over[draws].mean(1)
    return {
        "over_bound": float(over.mean()),
        "interval": [float(np.quantile(means, q)) for q in (0.025, 0.975)],
        "over_unswapped": float(unswapped.mean()),
        "swaps_per_answer": float(swaps.mean()),
    }


def judge_fold(store, number):
    """Train on four folds and judge the fifth: numbers by contender, and the levels chosen."""
    warnings.simplefilter("ignore")
    found = FeatureStore(store).load()
    fold = (((found.hashes >> 20) % 10_000) * FOLDS // 10_000).numpy()
    held = (((found.hashes >> 40) % 10) < 3).numpy()
    learn, choose, test = (
        found.select(torch.from_numpy(rows.nonzero()[0]))
        for rows in ((fold != number) & ~held, (fold != number) & held, fold == number)
    )
    predictors = {"prompt": fitted(learn, choose)}
    if len(found.step_time):
        predictors["PLP"] = fitted(learn, choose, plp=True)
    before, _ = judged(choose, predictors, 1, number)
    best = {}
    for (name, level), values in before.items():
        mean = float(values[:, 0].mean())
        if name not in best or mean < best[name][0]:
            best[name] = (mean, level)
    parts = {}
    after, errors = judged(test, predictors, DEALS, number)
    for (name, level), values in after.items():
        parts[name, level] = values
        if level == best[name][1]:
            parts[name, "chosen"] = values
            print(number, name, level, f"{values[:, 0].mean():.3f}", file=sys.stderr, flush=True)
    return parts, {name: level for name, (_, level) in best.items()}, errors


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="folds at a time")
    arguments = parser.parse_args()
    parts, picks, off = {}, [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        folds = pool.map(judge_fold, [arguments.store] * FOLDS, range(FOLDS))
        for values_of, levels, errors in folds:
            picks.append(levels)
            off.append(errors)
            for key, values in values_of.items():
                parts.setdefault(key, []).append(values)
    found = FeatureStore(arguments.store).load()
    rows = [
        {"arm": name, "level": level, **summary(np.concatenate(values))}
        for (name, level), values in parts.items()
    ]
    document = {
        "what": "decode steps over max(longest, ceil(sum / slots)), simulated on real lengths",
        "provenance": describe_run("packages/infsampling/benchmarks/lengths.py"),
        "store": {k: found.header[k] for k in ("model", "sampling", "num_samples", "features")},
        "prompts": len(found),
        "stopped": float(found.censored.double().mean()),
        "prompts_per_step": PROMPTS,
        "slots": PROMPTS * found.lengths.shape[1] // 2,
        "probe": PROBE,
        "log_errors": {name: float(np.mean([errors[name] for errors in off])) for name in off[0]},
        "chosen": picks,
        "rows": rows,
    }
    write_text(arguments.out, json.dumps(document, indent=1) + "\n")
    print(document["log_errors"])
    for row in sorted(rows, key=lambda row: row["over_bound"]):
        if row["level"] == "chosen":
            low, high = row["interval"]
            print(f"{row['arm']:33} {row['over_bound']:.3f} ({low:.3f} to {high:.3f})"
                  f" {row['over_unswapped']:.3f} {row['swaps_per_answer']:.1f} swaps")  # fmt: skip


if __name__ == "__main__":
    main()
