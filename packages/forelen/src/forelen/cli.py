"""The ``forelen`` command line: from prompts to a calibrated predictor, and what to do with it.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed, 2 bad input. No command loads torch before it runs.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

if TYPE_CHECKING:
    from forelen.collect import Prompt
    from forelen.metrics import Report

app = App(
    name="forelen",
    help="Predict how long a language model's answers will be, and schedule by it.",
    version=lambda: _version(),
    help_format="plaintext",
)

Pooling = Literal["entropy", "last", "mean", "max", "entropy+last"]
Split = Literal["train", "validation", "calibration", "test"]


@app.command
def collect(
    model: str,
    *,
    out: Path,
    prompts: Path | None = None,
    mini: tuple[str, ...] = (),
    count: int = 200,
    samples: int = 8,
    max_new_tokens: int = 512,
    max_prompt_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    features: tuple[str, ...] = ("entropy.-1.content",),
    batch_size: int = 8,
    seed: int = 0,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Ask a model prompts, several times each, and keep its states and the lengths of its answers.

    A collection that was stopped goes on when the same command is given again. Features tell of the
    prompts: treat the folder as you treat them.

    Args:
        model: Folder or name on the Hugging Face hub.
        out: Folder to write.
        prompts: A text file with a prompt in each line, or JSON lines with ``text`` and, if wanted,
            ``family`` and ``scenario``.
        mini: Scenarios of ForeLen-mini instead: Reasoning, RL, Code, LongSeq, Facts.
        count: Prompts of each scenario.
        samples: Answers to each prompt.
        max_new_tokens: Answers are stopped here, and marked.
        max_prompt_tokens: Longer prompts are left out.
        temperature: Of the sampling.
        top_p: Of the sampling.
        features: Vectors of the prompt to keep: POOLING.LAYER.content or POOLING.LAYER.all.
        batch_size: Prompts at a time.
        seed: Of the sampling.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of its weights.
        json_output: Print JSON.
    """
    asked = _prompts(prompts, mini, count, seed)
    from forelen.collect import FeatureCollector
    from forelen.pooling import FeatureSpec

    loaded, tokenizer = _load(model, device, dtype)
    collector = FeatureCollector(
        loaded,
        tokenizer,
        out,
        num_samples=samples,
        features=[FeatureSpec.from_key(key) for key in features],
        batch_size=batch_size,
        seed=seed,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        temperature=temperature,
        top_p=top_p,
        do_sample=True,
        top_k=0,
    )
    collector.collect(asked)
    return inspect(out, json_output=json_output)


@app.command
def train(
    store: Path,
    *,
    out: Path,
    pooling: Pooling = "entropy",
    layer: int = -1,
    all_tokens: bool = False,
    head: Literal["forelen", "paper", "linear"] = "forelen",
    steps: bool = True,
    epochs: int = 12,
    learning_rate: float = 1e-3,
    batch_size: int = 512,
    seed: int = 42,
    json_output: JsonFlag = False,
) -> int:
    """Train a predictor on a store, calibrate it, and report on prompts it has not seen.

    Prompts are divided by their hash: 70 % train, 10 % choose the epoch, 10 % calibrate, and 10 %
    are reported on. No answers to one prompt are in two parts.

    Args:
        store: Folder that `collect` wrote.
        out: Folder for the predictor.
        pooling: How the states of a prompt become one.
        layer: Of the states; -1 is the last.
        all_tokens: Use features of all tokens, those of the chat template too.
        head: forelen, paper (arXiv:2602.11812), or linear.
        steps: Also predict while an answer grows.
        epochs: Of the training.
        learning_rate: Of AdamW.
        batch_size: Rows.
        seed: Of the training.
        json_output: Print JSON.
    """
    from forelen import training
    from forelen.store import FeatureStore

    found = FeatureStore(store).load()
    parts = {name: found.split(name) for name in ("train", "validation", "calibration", "test")}
    arguments = training.default_arguments(
        out / "checkpoints",
        len(parts["validation"]) > 0,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        seed=seed,
        logging_strategy="no",
    )
    # the Trainer prints its numbers
    with contextlib.redirect_stdout(sys.stderr):
        predictor = training.train(
            parts["train"],
            output_dir=out / "checkpoints",
            validation=parts["validation"] if len(parts["validation"]) else None,
            arguments=arguments,
            head=head,
            pooling=pooling,
            layer=layer,
            content_only=not all_tokens,
            plp=steps and head != "linear",
        )
    if len(parts["calibration"]) >= training.FEWEST:
        training.calibrate(predictor, parts["calibration"])
    else:
        import warnings

        warnings.warn(
            f"{len(parts['calibration'])} prompts are too few to calibrate; collect 10 times as "
            f"many as {training.FEWEST}",
            UserWarning,
            stacklevel=2,
        )
    predictor.save_pretrained(out)
    return evaluate(out, store, json_output=json_output)


@app.command
def calibrate(
    predictor: Path, store: Path, *, split: Split = "calibration", out: Path | None = None
) -> int:
    """Calibrate a predictor on prompts that did not train it, for instance with other sampling.

    Args:
        predictor: Folder that `train` wrote.
        store: Folder that `collect` wrote.
        split: Prompts to calibrate on.
        out: Where to write; by default into the predictor's folder.
    """
    from forelen import training
    from forelen.modeling_forelen import LengthPredictor
    from forelen.store import FeatureStore

    loaded = LengthPredictor.from_pretrained(predictor)
    found = FeatureStore(store).load().split(split)
    training.calibrate(loaded, found)
    loaded.config.sampling = found.header["sampling"]
    loaded.save_pretrained(out or predictor)
    print(f"calibrated on {len(found)} prompts: {out or predictor}")
    return 0


@app.command
def evaluate(
    predictor: Path,
    store: Path,
    *,
    split: Split = "test",
    times: tuple[int, ...] = (0, 32, 128),
    json_output: JsonFlag = False,
) -> int:
    """Report errors beside the best constant and beside what is possible.

    Args:
        predictor: Folder that `train` wrote.
        store: Folder that `collect` wrote.
        split: Prompts to report on; answers to one prompt are never in two of them.
        times: Tokens of an answer that were read; 0 is before it begins.
        json_output: Print JSON.
    """
    from forelen import training
    from forelen.modeling_forelen import LengthPredictor
    from forelen.store import FeatureStore

    loaded = LengthPredictor.from_pretrained(predictor)
    found = FeatureStore(store).load(features=[loaded.config.feature_spec().key])
    constant = float(found.split("train").lengths.double().median())
    test = found.split(split)
    reports: dict[int, Report] = {}
    for time in times if loaded.config.plp else (0,):
        try:
            reports[time] = training.evaluate_collected(loaded, test, constant=constant, time=time)
        except ValueError:
            if not time:
                raise
            print(f"no answers were kept at {time} tokens; left out", file=sys.stderr)
    if json_output:
        return print_json({str(time): report.to_dict() for time, report in reports.items()})
    rows = [
        (
            "prompt" if not time else f"{time} tokens",
            f"{r.answers} / {r.prompts}",
            f"{r.mae:.1f} ({r.mae_interval[0]:.1f} to {r.mae_interval[1]:.1f})",
            f"{r.constant:.1f}",
            "" if r.floor is None else f"{r.floor:.1f}",
            "" if r.explained is None else f"{r.explained:.2f}",
            f"{r.kendall:.2f}",
            " ".join(f"{100 * share:.0f}" for share in r.coverage.values()),
        )
        for time, r in reports.items()
    ]
    print_table(
        rows,
        ("after", "answers / prompts", "MAE (95 %)", "constant", "siblings", "explained", "tau",
         "coverage of 50 80 90 95 %"),
    )  # fmt: skip
    print("constant: training's median. siblings: the median of the other answers to the prompt.")
    return 0


@app.command
def predict(
    predictor: Path,
    model: str,
    *,
    prompts: Path,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Predict the lengths of answers to prompts, before any is made.

    Args:
        predictor: Folder that `train` wrote.
        model: The model that will answer: folder or name on the Hugging Face hub.
        prompts: A text file with a prompt in each line, or JSON lines with ``text``.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of its weights.
        json_output: Print JSON.
    """
    import warnings

    import torch

    from forelen.collect import encode
    from forelen.modeling_forelen import LengthPredictor

    asked = _prompts(prompts, (), 0, 0)
    loaded, tokenizer = _load(model, device, dtype)
    head = LengthPredictor.from_pretrained(predictor)
    rows: list[dict[str, Any]] = []
    sampling = {k: v for k, v in head.config.sampling.items() if v is not None}
    for prompt in asked:
        ids = torch.tensor([encode(tokenizer, prompt.text)], device=loaded.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = head.predict(loaded, ids, **sampling)
        rows.append(
            {
                "text": prompt.text,
                "mean": float(found.mean()),
                **{f"q{int(100 * t)}": _finite(found.quantile(t)) for t in (0.1, 0.5, 0.9)},
                "calibrated": found.calibrated,
                "fallback": bool(found.fallback),
            }
        )
    if json_output:
        return print_json(rows)
    print_table(
        [
            (r["text"][:70], f"{r['mean']:.0f}", *(_number(r[q]) for q in ("q10", "q50", "q90")))
            for r in rows
        ],
        ("prompt", "mean", "10 %", "median", "90 %"),
    )
    return 0


@app.command
def simulate(
    lengths: Path,
    *,
    slots: int = 64,
    aging: float = 0.0,
    turn: int = 128,
    json_output: JsonFlag = False,
) -> int:
    """Show what an order by predicted length would do to a server with continuous batching.

    Args:
        lengths: JSON lines with ``length``, ``predicted`` and, if wanted, ``arrival`` in steps.
        slots: Answers that are made at the same time.
        aging: Tokens that a step of waiting makes up for.
        turn: Tokens after which an answer makes way, by turns.
        json_output: Print JSON.
    """
    import numpy as np

    from forelen.schedule.simulator import Trace
    from forelen.schedule.simulator import simulate as run

    rows = _lines(lengths, ("length", "predicted"))
    y = np.array([row["length"] for row in rows])
    guess = np.array([row["predicted"] for row in rows], dtype=float)
    trace = Trace(y, np.array([row.get("arrival", 0.0) for row in rows], dtype=float))
    arms = {
        "first come, first served": ("fifo", None),
        "shortest first": ("sjf", guess),
        "shortest first, by turns": ("turns", guess),
        "longest first": ("lpt", guess),
        "shortest first, true lengths": ("sjf", y),
        "longest first, true lengths": ("lpt", y),
    }
    found = {
        name: run(trace, policy, slots, predicted=by, aging=aging, turn=turn)
        for name, (policy, by) in arms.items()
    }
    table = {
        name: {
            "makespan": o.makespan, "mean_completion": o.mean_completion,
            "p99_completion": o.p99_completion, "longest_wait": o.longest_wait, "idle": o.idle,
            "pauses": o.pauses,
        }
        for name, o in found.items()
    }  # fmt: skip
    if json_output:
        return print_json(table)
    print_table(
        [
            (
                name, f"{o['makespan']:.0f}", f"{o['mean_completion']:.0f}",
                f"{o['p99_completion']:.0f}", f"{o['longest_wait']:.0f}", f"{o['idle']:.2f}",
                f"{o['pauses']}",
            )
            for name, o in table.items()
        ],
        ("order", "makespan", "mean completion", "99 %", "longest wait", "idle", "pauses"),
    )  # fmt: skip
    if len(y) <= slots:
        print(f"{len(y)} requests fit into {slots} slots: without a queue no order helps.")
    else:
        print(f"Steps of one token; the queue is {len(y) / slots:.1f} times the slots.")
    return 0


@app.command
def inspect(path: Path, *, json_output: JsonFlag = False) -> int:
    """Show what a store or a predictor holds.

    Args:
        path: Folder that `collect` or `train` wrote.
        json_output: Print JSON.
    """
    from forelen.metrics import sibling_floor
    from forelen.store import FeatureStore

    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "forelen":
            raise ValueError(f"path: {path} holds a model, but no predictor; give one of `train`")
        shown = {
            "model": config["fingerprint"].get("architecture"),
            "hidden size": config["hidden_size"],
            "head": config["head"],
            "pooling": f"{config['pooling']}, layer {config['layer']}",
            "content only": config["content_only"],
            "predicts while answers grow": config["plp"],
            "bins": len(config["bins"]["edges"]) - (config["bins"]["tail"] is None),
            "longest edge": config["bins"]["edges"][-1],
            "calibrated from ages": sorted(map(int, config["calibration"])),
            "sampling": config["sampling"],
        }
        if json_output:
            return print_json(shown)
        print_table([(name, str(value)) for name, value in shown.items()])
        return 0
    import torch

    found = FeatureStore(path).load(features=[], steps=False)
    rows: list[dict[str, Any]] = []
    for scenario in sorted(set(found.scenarios)):
        part = found.select([n for n, s in enumerate(found.scenarios) if s == scenario])
        y = part.lengths.double()
        groups = torch.arange(len(part)).repeat_interleave(y.shape[1])
        rows.append(
            {
                "scenario": scenario, "prompts": len(part), "mean": float(y.mean()),
                "median": float(y.median()), "stopped": float(part.censored.double().mean()),
                "constant_mae": float((y - y.median()).abs().mean()),
                "sibling_mae": sibling_floor(part.lengths.flatten(), groups),
            }
        )  # fmt: skip
    done = len(list((path / "shards").glob("[0-9]*.safetensors")))
    shown = {
        "model": found.header["model"]["architecture"], "batches": found.header["batches"],
        "batches_done": done, "samples": found.header["num_samples"],
        "features": found.header["features"], "sampling": found.header["sampling"],
        "scenarios": rows,
    }  # fmt: skip
    if json_output:
        return print_json(shown)
    print_table(
        [
            (
                r["scenario"], str(r["prompts"]), f"{r['mean']:.0f}", f"{r['median']:.0f}",
                f"{100 * r['stopped']:.0f} %", f"{r['constant_mae']:.0f}",
                "" if r["sibling_mae"] is None else f"{r['sibling_mae']:.0f}",
            )
            for r in rows
        ],
        ("scenario", "prompts", "mean", "median", "stopped", "MAE of a constant", "of siblings"),
        title=f"{shown['model']}, {done} of {shown['batches']} batches",
    )  # fmt: skip
    return 0


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if number < float("inf") else None


def _number(value: float | None) -> str:
    return "beyond" if value is None else f"{value:.0f}"


def _lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read JSON lines."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: no JSON ({error}); one object a line"
            ) from None
        for name in needed:
            if name not in row:
                raise ValueError(f"{path}, line {number}: expected {name}, got {sorted(row)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected lines, got none")
    return rows


def _prompts(path: Path | None, mini: tuple[str, ...], count: int, seed: int) -> list[Prompt]:
    """Read prompts of a file, or make those of scenarios."""
    if (path is None) == (not mini):
        raise ValueError("prompts: give either a file or scenarios of --mini")
    from forelen.collect import Prompt

    if path is None:
        from forelen.data.mini import mini_prompts

        return [prompt for name in mini for prompt in mini_prompts(name, count, seed=seed)]
    if path.suffix == ".jsonl":
        return [
            Prompt(row["text"], row.get("family", ""), row.get("scenario", ""))
            for row in _lines(path, ("text",))
        ]
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path}: expected a prompt in each line, got none")
    return [Prompt(text) for text in texts]


def _load(model: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return loaded.eval().to(chosen), tokenizer


def _version() -> str:
    from forelen import __version__

    return __version__


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit status.
    """
    return run_app(app, argv)
