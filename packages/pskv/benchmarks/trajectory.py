"""Fifty steps of a search by a real model, however the prefix is held: the same choices?

``python packages/pskv/benchmarks/trajectory.py MODEL --out FILE``: the same seed under no cache,
replicate, layerwise, split and, on a GPU, fused, in float32. Writes which steps agree in all
candidates and in the choice, the largest difference of a loss, and the time of each search; and
the same in bfloat16, where rounding may send a search another way.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from pskv import PrefixScorer
from pskv.bench import UncachedScorer
from pskv.search import CoordinateSearch, GradientSampler, SearchConfig
from shared_kernels.bench import describe_run
from shared_kernels.files import write_text

MESSAGES, TARGET = "Write a short greeting.", "Hello, sunshine!"


class Recorder(GradientSampler):
    """Keeps what was proposed."""

    def __init__(self, topk):
        super().__init__(topk)
        self.seen = []

    def propose(self, *args):
        self.seen.append(super().propose(*args))
        return self.seen[-1]


def run(model, tokenizer, name, config):
    scorer = (
        UncachedScorer(model, tokenizer)
        if name == "no cache"
        else PrefixScorer(model, tokenizer, backend=name)
    )
    sampler = Recorder(config.topk)
    result = CoordinateSearch(scorer, config, sampler=sampler).run(MESSAGES, TARGET, progress=False)
    return sampler.seen, result


def compare(model, tokenizer, names, config):
    runs = {name: run(model, tokenizer, name, config) for name in names}
    first_seen, first = runs["no cache"]
    rows = {}
    for name, (seen, result) in runs.items():
        candidates = [torch.equal(a, b) for a, b in zip(seen, first_seen, strict=True)]
        chosen = [a.ids == b.ids for a, b in zip(result.steps, first.steps, strict=True)]
        together = next((n for n, same in enumerate(chosen) if not same), len(chosen))
        losses = np.abs(np.array(result.losses) - np.array(first.losses))
        rows[name] = {
            "steps": len(chosen), "candidates_equal": sum(candidates), "chosen_equal": sum(chosen),
            "steps_together": together, "loss_difference": float(losses[:together].max(initial=0)),
            "first_loss": first.losses[0], "best_loss": result.loss, "tokens": result.tokens,
            "evaluations": result.evaluations, "seconds": result.seconds,
        }  # fmt: skip
    return rows


def table(found):
    """Return the result as Markdown."""
    rows = [
        "| dtype | prefix | steps with the same choice | candidates equal to the last | "
        "largest difference of a loss while together | loss after 50 steps | tokens computed |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for dtype in ("float32", "bfloat16"):
        for name, row in found.get(dtype, {}).items():
            rows.append(
                f"| {dtype} | {name} | {row['chosen_equal']} of {row['steps']} | "
                f"{row['candidates_equal']} of {row['steps']} | {row['loss_difference']:.1e} | "
                f"{row['best_loss']:.3f} | {row['tokens']:,} |"
            )
    machine, made = found["device"], found["provenance"]
    versions = made["versions"]
    return "\n".join([
        *rows, "",
        f"{machine}; torch {versions['torch']}, transformers {versions['transformers']}; commit "
        f"{made['commit'][:12]}; {made['date'][:10]}.",
    ])  # fmt: skip


def report(result, readme):
    """Fill the README's ``<!-- trajectory -->`` block."""
    begin, end = "<!-- trajectory -->", "<!-- /trajectory -->"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    body = table(json.loads(result.read_text(encoding="utf-8")))
    write_text(readme, f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, or a README to fill in from --out")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.model.endswith(".md"):
        report(arguments.out, Path(arguments.model))
        return
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = SearchConfig(steps=arguments.steps, width=arguments.width, topk=64, init="x x x x x x")
    names = [
        "no cache",
        "replicate",
        "layerwise",
        "split",
        *(["fused"] if device == "cuda" else []),
    ]
    found = {
        "provenance": describe_run("packages/pskv/benchmarks/trajectory.py"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "settings": {"steps": config.steps, "width": config.width, "seed": config.seed},
    }
    for dtype in (torch.float32, *([torch.bfloat16] if device == "cuda" else [])):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
        found[str(dtype).removeprefix("torch.")] = compare(model, tokenizer, names, config)
        write_text(arguments.out, json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
