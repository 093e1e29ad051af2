"""Which vector of a prompt, and which head, predict lengths best on prompts that were not seen.

``python packages/forelen/benchmarks/study.py STORE OUT.json``: every vector of a store under the
same head, a ridge regression of log lengths on the same vectors, and simpler predictors, by
cross-validation over prompts: all answers to a prompt are in one fold. Errors are in tokens; a
stopped answer counts as its cap. Folds, epochs and heads are the same for all; nothing is chosen on
the prompts that are reported.
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
from forelen.metrics import evaluate, sibling_floor
from forelen.pooling import FeatureSpec
from forelen.store import FeatureStore
from forelen.training import default_arguments, predict_rows, train
from shared_kernels.bench import describe_run
from shared_kernels.files import write_text

FOLDS, EPOCHS, ALPHA = 3, 5, 300.0


def folds(found, count=FOLDS):
    place = ((found.hashes >> 20) % 10_000) * count // 10_000
    for number in range(count):
        mine = place == number
        yield found.select((~mine).nonzero()[:, 0]), found.select(mine.nonzero()[:, 0])


def ridge(train_part, test, x):
    """Return errors of a ridge regression of the mean log length on x of each part."""
    a, b = (part.double() for part in x)
    mean, scale = a.mean(0), a.std(0) + 1e-6
    a, b = (a - mean) / scale, (b - mean) / scale
    y = torch.log1p(train_part.lengths.double()).mean(1)
    eye = torch.eye(a.shape[1]).double()
    weights = torch.linalg.solve(a.T @ a + ALPHA * eye, a.T @ (y - y.mean()))
    cap = test.header["sampling"]["max_new_tokens"]
    guess = torch.expm1(b @ weights + y.mean()).clamp(1, cap)
    return (guess[:, None] - test.lengths).abs().flatten()


def head(train_part, test, key, **settings):
    """Return the report of a trained head, and its errors."""
    spec = FeatureSpec.from_key(key)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = {
            "num_train_epochs": EPOCHS, "weight_decay": 0.1, "disable_tqdm": True,
            "logging_strategy": "no",
        }  # fmt: skip
        predictor = train(
            train_part, output_dir=folder, arguments=default_arguments(folder, False, **options),
            pooling=spec.pooling, layer=spec.layer, content_only=spec.content_only,
            entropy_shift=spec.entropy_shift, dropout=0.3, **settings,
        )  # fmt: skip
    rows = LengthDataset(test, predictor.config)
    law = predict_rows(predictor, rows)
    cap = test.header["sampling"]["max_new_tokens"]
    constant = float(train_part.lengths.double().median())
    report = evaluate(law, rows.labels, rows.group, constant=constant, cap=cap, resamples=10)
    return report, (law.median().clamp(max=cap) - rows.labels).abs()


def fill_block(readme, name, lines):
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = readme.read_text(encoding="utf-8").split(begin, 1)
    body = "\n".join(lines)
    write_text(readme, f"{before}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}")


def fill(readme, document):
    lines = [
        "| predictor | MAE (95 %) | of the way from constant to floor | CRPS |",
        "|---|--:|--:|--:|",
    ]
    for name, row in sorted(document["predictors"].items(), key=lambda item: item[1]["mae"]):
        low, high = row["mae_interval"]
        crps = "" if row["crps"] is None else f"{row['crps']:.1f}"
        error = f"{row['mae']:.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"| {name} | {error} | {row['explained']:.2f} | {crps} |")
    run = document["provenance"]
    lines += [
        f"| median of the other answers | {document['sibling_floor']:.1f} | 1 | |",
        "",
        f"{document['prompts']} prompts, {document['folds']} folds, tokens; torch "
        f"{run['versions']['torch']}; commit {(run['commit'] or '')[:12]}; {run['date'][:10]}.",
    ]
    fill_block(readme, "study", lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--readme", type=Path, help="fill this README from OUT, run nothing")
    arguments = parser.parse_args()
    if arguments.readme:
        fill(arguments.readme, json.loads(arguments.out.read_text(encoding="utf-8")))
        return
    warnings.simplefilter("ignore")
    found = FeatureStore(arguments.store).load(steps=False)
    errors, crps, floors, groups = {}, {}, [], []

    def add(name, values, score=None):
        errors.setdefault(name, []).append(values.double())
        if score is not None:
            crps.setdefault(name, []).append(score)

    offset = 0
    for train_part, test in folds(found):
        lengths = test.lengths.double()
        siblings = lengths.shape[1]
        group = torch.arange(len(test)).repeat_interleave(siblings)
        groups.append(group + offset)
        offset += len(test)
        floors.append((sibling_floor(test.lengths.flatten(), group), lengths.numel()))
        add("constant", (lengths - train_part.lengths.double().median()).abs().flatten())
        n = [torch.log1p(p.prompt_tokens.double())[:, None] for p in (train_part, test)]
        add("ridge, prompt length", ridge(train_part, test, [torch.cat([a, a**2], 1) for a in n]))
        for key in found.header["features"]:
            x = [part.prompts[key] for part in (train_part, test)]
            add(f"ridge, {key}", ridge(train_part, test, x))
            report, values = head(train_part, test, key)
            add(f"head, {key}", values, report.crps)
            print(key, round(report.mae, 1), file=sys.stderr, flush=True)
        if "entropy.-1.all" in found.header["features"]:
            report, values = head(train_part, test, "entropy.-1.all", head="paper")
            add("the paper's head, entropy.-1.all", values, report.crps)
    member = torch.cat(groups).numpy()
    counts = np.bincount(member)
    draws = np.random.default_rng(0).integers(0, len(counts), (1000, len(counts)))
    floor = sum(value * count for value, count in floors) / sum(count for _, count in floors)
    joined = {name: torch.cat(parts).numpy() for name, parts in errors.items()}
    constant = float(joined["constant"].mean())
    rows = {}
    for name, values in joined.items():
        totals = np.bincount(member, values)
        means = totals[draws].sum(1) / counts[draws].sum(1)
        rows[name] = {
            "mae": float(values.mean()),
            "mae_interval": [float(np.quantile(means, q)) for q in (0.025, 0.975)],
            "explained": (constant - float(values.mean())) / (constant - floor),
            "crps": float(np.mean(crps[name])) if name in crps else None,
        }
    document = {
        "what": "mean absolute error in tokens, cross-validated over prompts",
        "provenance": describe_run("packages/forelen/benchmarks/study.py"),
        "store": {k: found.header[k] for k in ("model", "sampling", "num_samples")},
        "prompts": len(found),
        "stopped": float(found.censored.double().mean()),
        "sibling_floor": floor,
        "folds": FOLDS,
        "predictors": rows,
    }
    write_text(arguments.out, json.dumps(document, indent=1) + "\n")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["mae"]):
        print(f"{row['mae']:7.1f} {row['explained']:6.2f} {name}")


if __name__ == "__main__":
    main()
