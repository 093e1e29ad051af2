"""How much an answer's own states say of what remains of it, and how often intervals hold.

``python packages/forelen/benchmarks/growing.py STORE OUT.json``: a predictor that also reads
answers while they grow (PLP) beside one that read the prompt alone, by cross-validation over
prompts: all answers to a prompt are in one fold; a tenth of the other folds chooses the epoch, and
two tenths calibrate. After t tokens all are judged on the answers that went on then, by what
remained:

- ``prompt``: the length predicted before the answer began, less t;
- ``prompt, survived``: the same distribution, given that the answer is longer than t;
- ``constant``: the median of what remained of training's answers that were longer than t;
- ``siblings``: the median of the prompt's other answers, less t.

A stopped answer counts as its cap. With a README instead of STORE, its table is filled from OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from forelen.dataset import LengthDataset
from forelen.metrics import LEVELS, covered
from forelen.store import FeatureStore
from forelen.training import calibrate, default_arguments, predict_rows, train
from shared_kernels.bench import describe_run
from shared_kernels.files import write_text
from study import fill_block, folds

EPOCHS, FOLDS = 6, 5
TIMES = (0, 1, 16, 32, 64, 128, 256)


def divided(found):
    """Return the parts that train, choose the epoch and calibrate."""
    place = ((found.hashes >> 40) % 10).numpy()
    rows = (place > 2, place == 0, (place == 1) | (place == 2))
    return [found.select(torch.from_numpy(chosen.nonzero()[0])) for chosen in rows]


def predictor(parts, device, **settings):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = {
            "num_train_epochs": EPOCHS, "weight_decay": 0.1, "disable_tqdm": True,
            "logging_strategy": "no", "use_cpu": device == "cpu",
        }  # fmt: skip
        made = train(
            parts[0], output_dir=folder, validation=parts[1], dropout=0.3,
            arguments=default_arguments(folder, True, **options), **settings,
        )  # fmt: skip
    return calibrate(made, parts[2])


def of_others(lengths):
    """Return for each answer the median of the other answers to its prompt."""
    y = lengths.double()
    others = [torch.cat([y[:, :n], y[:, n + 1 :]], 1) for n in range(y.shape[1])]
    return torch.stack([part.quantile(0.5, 1) for part in others], 1).flatten()


def judge(test, training, grown, before, time, cap):
    """Return errors by predictor, hits by level, and prompts, of answers longer than ``time``."""
    rows = LengthDataset(test, grown.config)
    chosen = (rows.time == time).nonzero()[:, 0]
    sample, left = rows.sample[chosen], rows.labels[chosen].double()
    first = LengthDataset(test, before.config)
    static = predict_rows(before, first)
    law = predict_rows(grown, rows, chosen=chosen, time=time)
    seen = torch.full_like(sample, time)
    survived = static[sample].after(seen).median() if time else static.median()[sample]
    rest = training[training > time] - time
    guesses = {
        "PLP": law.median(),
        "prompt": static.median()[sample] - time,
        "prompt, survived": survived,
        "constant": rest.double().median().expand(len(left)),
        "siblings": of_others(test.lengths)[sample] - time,
    }
    errors = {
        name: (guess.clamp(1, cap - time) - left).abs().numpy() for name, guess in guesses.items()
    }
    stopped = rows.censored[chosen]
    hits = {
        f"{level:g}": covered(law, rows.labels[chosen], level, censored=stopped).numpy()
        for level in LEVELS
    }
    return errors, hits, rows.group[chosen].numpy()


def by_prompt(values, groups, draws):
    """Return means of resamples of the prompts."""
    _, member = np.unique(groups, return_inverse=True)
    totals, counts = np.bincount(member, values), np.bincount(member)
    chosen = draws.integers(0, len(counts), (1000, len(counts)))
    return totals[chosen].sum(1) / counts[chosen].sum(1)


def summary(parts):
    """Join the folds of one time."""
    groups = np.concatenate([part[2] + 1_000_000 * n for n, part in enumerate(parts)])
    errors = {k: np.concatenate([part[0][k] for part in parts]) for k in parts[0][0]}
    hits = {k: np.concatenate([part[1][k] for part in parts]) for k in parts[0][1]}

    def resampled(name):
        return by_prompt(errors[name], groups, np.random.default_rng(0))

    def interval(values):
        return [float(np.quantile(values, q)) for q in (0.025, 0.975)]

    mean = {name: float(values.mean()) for name, values in errors.items()}
    return {
        "answers": len(groups),
        "prompts": len(np.unique(groups)),
        "mae": mean,
        "mae_interval": {name: interval(resampled(name)) for name in errors},
        "over_prompt": mean["PLP"] / mean["prompt"],
        "over_prompt_interval": interval(resampled("PLP") / resampled("prompt")),
        "explained": (mean["constant"] - mean["PLP"]) / (mean["constant"] - mean["siblings"]),
        "coverage": {name: float(values.mean()) for name, values in hits.items()},
    }


def fill(readme, document):
    names = ("PLP", "prompt", "prompt, survived", "constant", "siblings")
    lines = [
        f"| tokens read | answers | {' | '.join(names)} | PLP over prompt (95 %) "
        f"| 50 / 80 / 90 / 95 % intervals hold |",
        "|--:|--:|" + "--:|" * len(names) + "--:|--:|",
    ]
    for time, row in document["times"].items():
        low, high = row["over_prompt_interval"]
        errors = " | ".join(f"{row['mae'][name]:.1f}" for name in names)
        held = " / ".join(f"{100 * value:.1f}" for value in row["coverage"].values())
        lines.append(
            f"| {time} | {row['answers']} | {errors} | {row['over_prompt']:.3f} "
            f"({low:.3f} to {high:.3f}) | {held} |"
        )
    run = document["provenance"]
    lines += [
        "",
        f"{document['prompts']} prompts, {document['folds']} folds, errors in tokens; torch "
        f"{run['versions']['torch']}; commit {(run['commit'] or '')[:12]}; {run['date'][:10]}.",
    ]
    fill_block(readme, "growing", lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.store.suffix == ".md":
        fill(arguments.store, json.loads(arguments.out.read_text(encoding="utf-8")))
        return
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = FeatureStore(arguments.store).load()
    cap = found.header["sampling"]["max_new_tokens"]
    parts = {time: [] for time in TIMES}
    for number, (train_part, test) in enumerate(folds(found, FOLDS)):
        kept = divided(train_part)
        grown = predictor(kept, device, plp=True)
        before = predictor(kept, device)
        training = kept[0].lengths.flatten()
        for time in TIMES:
            outcome = judge(test, training, grown, before, time, cap)
            parts[time].append(outcome)
            means = {name: round(float(e.mean()), 1) for name, e in outcome[0].items()}
            print(number, time, means, file=sys.stderr, flush=True)
    document = {
        "what": "mean absolute error in tokens of what remains, cross-validated over prompts",
        "provenance": describe_run("packages/forelen/benchmarks/growing.py"),
        "store": {k: found.header[k] for k in ("model", "sampling", "num_samples", "features")},
        "prompts": len(found),
        "stopped": float(found.censored.double().mean()),
        "median_length": float(found.lengths.double().median()),
        "folds": FOLDS,
        "times": {str(time): summary(part) for time, part in parts.items()},
    }
    write_text(arguments.out, json.dumps(document, indent=1) + "\n")
    for time, row in document["times"].items():
        print(time, row["answers"], {k: round(v, 1) for k, v in row["mae"].items()},
              f"{row['over_prompt']:.3f}", row["coverage"])  # fmt: skip


if __name__ == "__main__":
    main()
