"""The ``infsampling`` command line: plans, samples, trains, and compares.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed or the model is refused, 2 bad input. No command loads torch
before it runs.
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import Any, Literal

from cyclopts import App
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

app = App(
    name="infsampling",
    help="Sample big groups of completions per prompt in bounded memory.",
    version=lambda: _version(),
    help_format="plaintext",
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Policy = Literal["auto", "lpt", "fifo", "sjf", "group_sjf", "paper", "lrpt", "turns"]
Simulated = Literal[
    "all", "lpt", "fifo", "sjf", "group_sjf", "paper", "lrpt", "turns", "rounds", "sorted_rounds"
]


@app.command
def plan(
    model: str,
    *,
    group: int,
    prompts: int = 1,
    prompt_len: int = 256,
    max_new: int = 1024,
    memory: str = "16GiB",
    mean_len: float | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Count what sampling would take, and how many slots that leaves; no weights are read.

    Args:
        model: Folder or name on the Hugging Face hub.
        group: Completions of each prompt.
        prompts: Unique prompts.
        prompt_len: Tokens of each.
        max_new: Tokens of a completion at most.
        memory: For keys, values and work space, beside the weights: 16GiB, 800MB, or bytes.
        mean_len: Expected tokens of a completion; half of max-new by default.
        dtype: Of the weights; auto takes what the configuration says.
        json_output: Print JSON.
    """
    from dataclasses import asdict

    import torch
    from shared_kernels.units import format_bytes
    from transformers import AutoConfig, AutoModelForCausalLM

    from infsampling.config import SamplingConfig
    from infsampling.memory import make_plan

    for name, value in (("--group", group), ("--prompts", prompts), ("--prompt-len", prompt_len)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    loaded = AutoConfig.from_pretrained(model)
    chosen = loaded.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(loaded, dtype=chosen)
    config = SamplingConfig(max_new_tokens=max_new, memory_budget=_bytes("--memory", memory))
    found = make_plan(
        outline, config, [prompt_len] * prompts, [group] * prompts, mean_length=mean_len
    )
    if json_output:
        rounds = {"rounds": len(found.rounds)}
        return print_json({"name": model, **asdict(found), **rounds, "total": found.total})
    print_table(
        [
            ("slots", f"{found.slots:,} for {group * prompts:,} completions"),
            ("slots, keys and values and logits", format_bytes(found.slots * found.slot)),
            ("rounds, of prompts that fit together", f"{len(found.rounds):,}"),
            ("prompts of a round, each once", format_bytes(found.prefixes)),
            ("tokens and log-probabilities", format_bytes(found.outputs)),
            ("together", format_bytes(found.total)),
            ("a full group with a prompt each", format_bytes(found.full_group)),
            ("weights", format_bytes(found.weights)),
        ],
        ("what", "memory"),
    )
    return 0


@app.command
def generate(
    model: str,
    *,
    prompts: Path,
    out: Path,
    group: int = 8,
    max_new: int = 512,
    max_slots: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    policy: Policy = "auto",
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Sample completions of many prompts, a JSON line in, a JSON line per completion out.

    A line in is a text, {"prompt": "a text"}, or {"prompt": [{"role": "user", "content": "..."}]}.
    Lines are written as completions end. A run that was stopped goes on where it was: completions
    are a function of the seed, and those that are there are not made again.

    Args:
        model: Folder or name on the Hugging Face hub.
        prompts: JSON lines.
        out: JSON lines, appended to; its settings go to a file beside it.
        group: Completions of each prompt.
        max_new: Tokens of a completion at most.
        max_slots: Completions decoded at once; by default what fits and pays.
        temperature: 0 takes the likeliest token.
        top_k: 0 draws from all tokens.
        top_p: 1 draws from all tokens.
        min_p: 0 draws from all tokens.
        seed: Of all draws.
        policy: Which completion takes a free slot.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from infsampling.config import SamplingConfig
    from infsampling.files import read_prompts, sample_to_file

    if group < 1:
        raise ValueError(f"--group: expected at least 1, got {group}")
    config = SamplingConfig(
        max_slots=max_slots or "auto", max_new_tokens=max_new, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, seed=seed, policy=policy,
    )  # fmt: skip
    wanted = read_prompts(prompts)
    loaded, tokenizer = _load(model, device, dtype)
    found = sample_to_file(loaded, tokenizer, config, wanted, group, out, name=model)
    if json_output:
        return print_json(found)
    print_table([(key.replace("_", " "), f"{value:,}") for key, value in found.items()])
    return 0


@app.command
def train(
    model: str,
    *,
    data: Path,
    reward: str,
    out: Path,
    steps: int,
    group: int = 8,
    batch: int = 8,
    accumulate: int = 1,
    max_new: int = 512,
    max_slots: int | None = None,
    temperature: float = 1.0,
    lr: float = 1e-6,
    schedule: str = "linear",
    beta: float = 0.0,
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo",
    lora: int | None = None,
    save_steps: int = 100,
    seed: int = 0,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Train a model by GRPO on a reward of yours.

    Each step samples the completions of batch * accumulate / group prompts and learns from them.
    A run that was stopped goes on from its last checkpoint in --out, and makes the same steps as
    one that was not. The model, or the adapters, and the tokenizer are saved to --out in the end.

    Args:
        model: Folder or name on the Hugging Face hub.
        data: JSON lines with a prompt, a text or a list of messages, and what the reward reads.
        reward: A function, as module:name or file.py:name, called as TRL calls reward functions:
            with lists prompts, completions, completion_ids and the further columns by name; it
            returns a number for each completion.
        out: Folder of checkpoints and of the result.
        steps: Optimizer steps.
        group: Completions of each prompt.
        batch: Completions of one backward pass.
        accumulate: Backward passes of a step.
        max_new: Tokens of a completion at most.
        max_slots: Completions decoded at once; by default what fits and pays.
        temperature: Of the draws.
        lr: Learning rate.
        schedule: Of the learning rate, by its name in transformers: linear, constant, cosine.
        beta: Weight of the divergence from the model at the start.
        loss: Variant of the loss.
        lora: Rank of adapters to train instead of the model (needs peft).
        save_steps: Steps between two checkpoints.
        seed: Of the draws and of the order of prompts.
        device: cpu, or by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON, the log of each step included.
    """
    from infsampling.learning import Lesson, load_reward, read_rows, run

    lesson = Lesson(
        steps=steps, group=group, batch=batch, accumulate=accumulate, max_new=max_new,
        max_slots=max_slots, temperature=temperature, lr=lr, schedule=schedule, beta=beta,
        loss=loss, lora=lora, save_steps=save_steps, seed=seed,
    )  # fmt: skip
    function, rows = load_reward(reward), read_rows(data)
    loaded, tokenizer = _load(model, device, dtype)
    log = run(loaded, tokenizer, rows, function, lesson, out, on_cpu=loaded.device.type == "cpu")
    if json_output:
        return print_json({"out": str(out), "log": log})
    shown = ("reward", "reward_std", "completions/mean_length", "sampling/tokens_per_second")
    print_table(
        [(f"{line['step']:,}", *(f"{line[name]:.3f}" for name in shown)) for line in log],
        ("step", "reward", "its deviation", "tokens a completion", "sampled tokens a second"),
    )
    return 0


@app.command
def bench(
    model: str,
    *,
    prompt: str = "Name a colour and say why you like it.",
    group: int = 16,
    max_new: int = 128,
    max_slots: int | None = None,
    rounds: int = 3,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Time a group of completions here, by this package and by transformers.

    Its generate, and on a GPU its generate_batch. The ways run in turn in one process and the
    medians are compared. Each draws its own
    completions at temperature 1, so that lengths differ a little; tokens a second count what each
    made.

    Args:
        model: Folder or name on the Hugging Face hub.
        prompt: A text; in the model's chat template if it has one.
        group: Completions.
        max_new: Tokens of a completion at most.
        max_slots: Completions decoded at once; by default what fits and pays.
        rounds: Timed rounds, after one to warm up.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from infsampling.comparison import compare

    for name, value in (("--group", group), ("--rounds", rounds), ("--max-new", max_new)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    loaded, tokenizer = _load(model, device, dtype)
    found = compare(loaded, tokenizer, prompt, group, max_new, max_slots, rounds)
    if json_output:
        return print_json({"name": model, "group": group, "arms": found})
    print_table(
        [
            (
                name,
                arm["failed"] or f"{arm['tokens_per_second']:,.1f}",
                "" if arm["failed"] else f"{arm['seconds']:.2f} s",
                "" if arm["failed"] else f"{arm['tokens']:,.0f}",
            )
            for name, arm in found.items()
        ],
        ("way", "tokens a second", "a call", "tokens"),
    )
    return 0


@app.command
def simulate(
    *,
    lengths: Path,
    slots: int,
    policy: Simulated = "all",
    noise: float = 0.0,
    sync_every: int = 16,
    rerank_every: int = 64,
    turn: int = 64,
    park_limit: float = 2.0,
    seed: int = 0,
    json_output: JsonFlag = False,
) -> int:
    """Count the steps of each policy on lengths that you have.

    Args:
        lengths: JSON lines, on each the lengths of the samples of one rollout: [12, 40, 7].
        slots: Samples decoded at once.
        policy: One, or all.
        noise: Predictions are the lengths times a lognormal variable of this sigma.
        sync_every: Steps between two looks of the host.
        rerank_every: Steps between two rankings, for policies that park.
        turn: Steps of a turn.
        park_limit: Samples leave their slots once so many times the slots are left, or fewer.
        seed: Of the noise.
        json_output: Print JSON.
    """
    import numpy as np

    from infsampling.scheduling.simulator import SIMULATED
    from infsampling.scheduling.simulator import simulate as run

    rollouts = _read_lengths(lengths)
    random = np.random.default_rng(seed)
    believed = [np.array(r) * np.exp(noise * random.standard_normal(len(r))) for r in rollouts]
    found: dict[str, dict[str, float]] = {}
    for name in SIMULATED if policy == "all" else (policy,):
        results = [
            run(
                rollout, slots, name, guess, sync_every=sync_every, rerank_every=rerank_every,
                turn=turn, park_limit=park_limit,
            )
            for rollout, guess in zip(rollouts, believed, strict=True)
        ]  # fmt: skip
        found[name] = {
            "steps": float(np.mean([r.steps for r in results])),
            "over_bound": float(np.mean([r.over_bound for r in results])),
            "utilisation": float(np.mean([r.utilisation for r in results])),
            "swaps": float(np.mean([r.swaps for r in results])),
            "mean_completion": float(np.mean([r.ends.mean() for r in results])),
        }
    if json_output:
        return print_json({"slots": slots, "rollouts": len(rollouts), "policies": found})
    print_table(
        [
            (
                name,
                f"{r['steps']:.1f}",
                f"{r['over_bound']:.3f}",
                f"{r['utilisation']:.2f}",
                f"{r['swaps']:.1f}",
                f"{r['mean_completion']:.1f}",
            )
            for name, r in found.items()
        ],
        ("policy", "steps", "over the bound", "slots in use", "swaps", "mean completion"),
        title=f"{len(rollouts)} rollouts on {slots} slots, means",
    )
    print("The bound of policies that park is lower: they may cut a sample in pieces.")
    return 0


@app.command
def doctor(
    model: str,
    *,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Say whether a model can be sampled here, whether it is right, and whether orders matter.

    The exit status is 1 if the model is refused, or if its tokens depend on the schedule.

    Args:
        model: Folder or name on the Hugging Face hub.
        device: Where to load it; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from infsampling.diagnosis import diagnose

    found = diagnose(_load(model, device, dtype)[0])
    code = 0 if found.works else 1
    if json_output:
        print_json({"name": model, **found.to_dict()})
        return code
    rows = [("model", f"{found.model}, {found.dtype} on {found.device}")]
    if found.error is not None:
        say = {True: "yes", False: "no"}
        rows += [
            ("log-probabilities differ from one pass by", f"{found.error:.1e} nats on average"),
            ("tokens are the same under every schedule", say[bool(found.same_tokens)]),
            ("and log-probabilities bit for bit", say[bool(found.same_bits)]),
            ("the step is a CUDA graph", say[bool(found.graph)]),
            ("a step of 8 slots", f"{1e3 * (found.step_seconds or 0):.1f} ms"),
        ]
    print_table(rows)
    if found.refused is not None:
        print(f"It cannot be sampled: {found.refused}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_app(app, argv)


def _version() -> str:
    from infsampling._version import __version__

    return __version__


def _load(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(chosen).eval()
    return model, AutoTokenizer.from_pretrained(name)


def _bytes(option: str, text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    upper = text.strip().upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if upper.endswith(u)), "")
    try:
        found = float(upper.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        found = 0.0
    if found <= 1:
        raise ValueError(f"{option}: expected a size such as 16GiB, 800MB or bytes, got {text!r}")
    return int(found)


def _read_lengths(path: Path) -> list[list[int]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise ValueError(
                f"--lengths: line {number} of {path}: expected a list of lengths such as "
                f"[12, 40, 7], got {line[:60]!r}"
            )
        if value:
            found.append(value)
    if not found:
        raise ValueError(f"--lengths: expected at least one line in {path}")
    return found
