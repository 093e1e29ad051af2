"""The ``pskv`` command line: whether a model can share prefixes, what it costs, and scores.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed or the model is refused, 2 bad input. No command loads torch
before it runs.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import Any, Literal

from cyclopts import App
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

app = App(
    name="pskv",
    help="Score many continuations of one prefix on a model of your own.",
    version=lambda: _version(),
    help_format="plaintext",
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@app.command
def doctor(
    model: str,
    *,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Say whether a model can share a prefix, how exactly, and which way is the fastest here.

    Every way is compared with one uncached pass per row on random tokens. The exit status is 1 if
    the model is refused.

    Args:
        model: Folder or name on the Hugging Face hub.
        device: Where to load it; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from pskv.diagnosis import diagnose

    loaded, tokenizer = _load(model, device, dtype)
    found = diagnose(loaded, tokenizer)
    if json_output:
        print_json({"name": model, **found.to_dict()})
        return 0 if found.works else 1
    kinds = ", ".join(f"{found.layers.count(kind)} {kind}" for kind in sorted(set(found.layers)))
    rows = [
        ("model", f"{found.model}, {found.dtype} on {found.device}"),
        ("layers", kinds),
        ("layers told of a window", str(len(found.windows))),
    ]
    if found.chat_survives is not None:
        rows.append(
            ("a chat can be written and read again", "yes" if found.chat_survives else "no")
        )
    print_table(rows)
    if not found.works:
        print(f"It cannot be scored: {found.refused}")
        return 1
    print_table(
        [
            (
                b.name,
                f"{b.error:.1e}",
                f"{1e3 * b.seconds:.1f}",
                "*" if b.name == found.fastest else "",
            )
            for b in found.backends
        ],
        ("backend", "largest error (nats)", "ms", "fastest"),
    )
    print(
        f"Fastest at this size: {found.fastest}. Hidden states agree to {found.hidden_error:.1e} "
        f"of their norm, logits by the head taken apart to {found.logits_error:.1e} (allowed: "
        f"{found.bound:.0e})."
    )
    return 0


@app.command
def plan(
    model: str,
    *,
    prefix_len: int,
    width: int = 512,
    length: int = 45,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Count what each way of scoring would hold in memory. Only the configuration is read.

    Args:
        model: Folder or name on the Hugging Face hub.
        prefix_len: Tokens of the prefix.
        width: Continuations.
        length: Tokens of each, targets included.
        dtype: Of the weights; auto takes what the configuration says.
        json_output: Print JSON.
    """
    import torch
    from shared_kernels.units import format_bytes
    from transformers import AutoConfig, AutoModelForCausalLM

    from pskv.memory import memory_plan

    config = AutoConfig.from_pretrained(model)
    chosen = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=chosen)
    found = memory_plan(outline, prefix_len, width, length)
    if json_output:
        return print_json({"name": model, **found.to_dict()})
    print_table(
        [
            ("weights", format_bytes(found.weights)),
            ("prefix, held once", format_bytes(found.prefix)),
            (f"shared prefix, {found.micro_batch:,} tokens a pass", format_bytes(found.shared)),
            ("copies in one layer (the paper)", format_bytes(found.layerwise)),
            ("copies in all layers (search tools)", format_bytes(found.replicate)),
            ("no cache, all rows at once", format_bytes(found.no_cache)),
            ("logits at all positions, if computed", format_bytes(found.logits)),
        ],
        ("beside the weights", "memory"),
    )
    print("Counted from the model's widths; the last four are for all rows in one batch.")
    return 0


@app.command
def score(
    model: str,
    *,
    prefix: Path,
    continuations: Path,
    out: Path | None = None,
    chat: bool = False,
    reduction: Literal["sum", "mean"] = "sum",
    device: str | None = None,
    dtype: Dtype = "auto",
) -> int:
    """Score continuations of one prefix, and print a JSON object for each, in order.

    Args:
        model: Folder or name on the Hugging Face hub.
        prefix: Text file: the prefix as it stands.
        continuations: JSON Lines: texts, or objects with "text" and perhaps "target"; with a
            target only the target is scored, after the text.
        out: Write the lines to this file instead.
        chat: The prefix is what a user says, and continuations are answers.
        reduction: Sum or mean over the scored tokens, in nats.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
    """
    from shared_kernels.files import write_text

    from pskv.scorer import PrefixScorer

    items = _read_continuations(continuations)
    text = prefix.read_text(encoding="utf-8")
    scorer = PrefixScorer(*_load(model, device, dtype))
    targets = [item["target"] for item in items] if "target" in items[0] else None
    output = scorer.score(
        [{"role": "user", "content": text}] if chat else text,
        [item["text"] for item in items], targets=targets, reduction=reduction,
    )  # fmt: skip
    values = zip(items, output.logprobs, output.is_greedy, output.num_tokens, strict=True)
    lines = [
        json.dumps(item | {"logprob": float(v), "is_greedy": bool(g), "num_tokens": int(n)})
        for item, v, g, n in values
    ]
    if out is not None:
        write_text(out, "\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
    logging.getLogger(__name__).info("%s", output.stats)
    return 0


@app.command
def bench(
    model: str,
    *,
    against: str = "no cache,replicate,layerwise",
    prefix_len: int = 256,
    width: int = 64,
    suffix: int = 20,
    tail: int = 5,
    target: int = 20,
    backend: str = "auto",
    seconds: float = 20.0,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Time a step of a search on this machine beside the ways other tools hold the prefix.

    All run in one process on the same random candidates, each at the batch that a trial found
    fastest for it, with logits at the targets only.

    Args:
        model: Folder or name on the Hugging Face hub.
        against: Some of: no cache, replicate, layerwise.
        prefix_len: Tokens of the prefix.
        width: Candidates.
        suffix: Tokens in which they differ.
        tail: Tokens behind these.
        target: Tokens that are scored.
        backend: Of the scorer.
        seconds: How long to measure.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from shared_kernels.bench import Ceilings, Plan, describe_run, run_workload

    from pskv.bench import StepProblem, step_workload
    from pskv.scorer import PrefixScorer

    scorer = PrefixScorer(*_load(model, device, dtype), backend=backend)
    problem = StepProblem(
        scorer, prefix=prefix_len, rows=width, suffix=suffix, tail=tail, target=target
    )
    workload = step_workload(problem, [part.strip() for part in against.split(",")])
    measured = run_workload(workload, Ceilings(scorer.device.type), Plan(max_seconds=seconds))
    if json_output:
        return print_json({"name": model, "provenance": describe_run("pskv bench"), **measured})
    print_table(
        [
            (
                arm["name"], f"{1e3 * arm['seconds']['median']:.1f}",
                f"{arm['speedup']['ratio']:.2f}x" if arm["speedup"] else "",
            )
            for arm in measured["arms"] if not arm["error"]
        ],
        ("way", "ms, median", f"speed, {measured['baseline']} is 1"),
    )  # fmt: skip
    return 0


@app.command
def robustness(
    model: str,
    *,
    out: Path,
    canaries: Path | None = None,
    search: Literal["coordinate", "beam"] = "coordinate",
    steps: int = 100,
    width: int = 128,
    seeds: int = 5,
    system: str | None = None,
    max_perplexity: float | None = None,
    filter: bool = True,
    against: Path | None = None,
    plot: Path | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
) -> int:
    """Measure how many evaluations it takes until your model says benign sentences.

    Writes a JSON report after every search, goes on from it when called again, and prints a
    summary in Markdown. Sentences are stored as hashes.

    Args:
        model: Folder or name on the Hugging Face hub: a model that you own or may test.
        out: The JSON report.
        canaries: JSON Lines with "target" and perhaps "messages"; two sentences by default.
        search: coordinate (by gradients) or beam (without).
        steps: Steps of a search at most; tokens of a beam search.
        width: Candidates of a step; beams times expansions of a beam search.
        seeds: Searches for each sentence.
        system: System prompt, a defence to measure.
        max_perplexity: Drop candidates above it, a defence to measure.
        filter: Keep only candidates that can be typed.
        against: An earlier report of the same canaries and seeds to compare with.
        plot: Draw the share elicited against the evaluations.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
    """
    from pskv.robustness import CANARIES, RobustnessReport, measure, read_canaries
    from pskv.scorer import PrefixScorer
    from pskv.search.config import BeamConfig, SearchConfig

    chosen = list(CANARIES) if canaries is None else read_canaries(canaries)
    other = None if against is None else RobustnessReport.load(against)
    beams = max(1, round(width**0.5))
    config = (
        BeamConfig(
            length=steps, beams=beams, expansions=max(1, width // beams), filter=filter,
            max_perplexity=max_perplexity,
        )
        if search == "beam"
        else SearchConfig(steps=steps, width=width, filter=filter, max_perplexity=max_perplexity)
    )  # fmt: skip
    scorer = PrefixScorer(*_load(model, device, dtype))
    report = measure(scorer, chosen, config, seeds=seeds, system=system, out=out)
    report.save(out)
    print(report.to_markdown(other), end="")
    if plot is not None:
        report.plot(plot, other)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_app(app, argv)


def _version() -> str:
    from pskv._version import __version__

    return __version__


def _load(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(chosen).eval()
    return model, AutoTokenizer.from_pretrained(name)


def _read_continuations(path: Path) -> list[dict[str, str]]:
    items: list[dict[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        item = {"text": value} if isinstance(value, str) else value
        if (
            not isinstance(item, dict) or not isinstance(item.get("text"), str)
            or (items and ("target" in item) != ("target" in items[0]))
        ):  # fmt: skip
            raise ValueError(
                f'--continuations: line {number} of {path}: expected a text or {{"text": "..."}}, '
                f"with a target in all lines or in none, got {line[:60]!r}"
            )
        items.append(item)
    if not items:
        raise ValueError(f"--continuations: expected at least one line in {path}")
    return items
