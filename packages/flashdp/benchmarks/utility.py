"""What privacy costs in quality: LoRA fine-tuning on facts, by clipping groups and epsilon.

Units are generated facts whose structure can be learned (a department decides floor, manager and
shift) and whose rest cannot (names, badges). A few hold door codes that must not be learned: how
well a trained model knows them is their exposure. All arms take the same number of steps with the
same optimizer; learning rates are chosen per arm on validation facts, at one epsilon. The run
without privacy clips its batch gradients at the same norm, as trainers do.

    python packages/flashdp/benchmarks/utility.py run --model FOLDER --device cuda --jobs 4
    python packages/flashdp/benchmarks/utility.py report

Runs that the result file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "utility.json"
PLOT = HERE / "results" / "utility.svg"
README = HERE.parent / "README.md"
COMMAND = "python packages/flashdp/benchmarks/utility.py run --model FOLDER --device cuda --jobs 4"

ORDINARY = "without privacy"
#: Options of `make_private`; "adaptive" stands for thresholds that follow the median, "corrected"
#: for `flashdp.AdamWBC` in place of AdamW.
ARMS: dict[str, dict[str, Any]] = {
    "module": {"grouping": "module"},
    "module, adaptive": {"grouping": "module", "adaptive": True},
    "block": {"grouping": "block"},
    "flat": {"grouping": "flat"},
    "flat, AdamWBC": {"grouping": "flat", "corrected": True},
}


@dataclass(frozen=True)
class Study:
    """What all runs share.

    Attributes:
        units: Training facts, door codes among them.
        held_out: Facts for validation, and as many for the test.
        batch: Expected units of a step.
        steps: Of the optimizer.
        rank: Of the adapters, on the attention's q and v.
        clip: C.
        delta: Of every guarantee.
        epsilons: To reach.
        tuned_at: The epsilon at which rates are chosen.
        rates: To choose from.
        codes: Door codes planted for each number of repetitions.
        repeats: Units that hold the same code.
        candidates: Codes among which a planted one is ranked.
        seed: Of facts, adapters, draws and noise. Runs with a seed are for measuring only.
    """

    units: int = 20_000
    held_out: int = 1000
    batch: int = 384
    steps: int = 120
    rank: int = 16
    clip: float = 1.0
    delta: float = 1e-6
    epsilons: tuple[float, ...] = (1.0, 3.0, 8.0)
    tuned_at: float = 3.0
    rates: tuple[float, ...] = (8e-4, 2e-3, 5e-3, 1.25e-2, 3e-2, 7.5e-2)
    codes: int = 8
    repeats: tuple[int, ...] = (1, 16)
    candidates: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: Name in `ARMS`, or `ORDINARY`.
        epsilon: To reach; None without privacy.
        rate: Learning rate.
    """

    arm: str
    epsilon: float | None
    rate: float


@dataclass(frozen=True)
class Outcome:
    """What one training led to.

    Attributes:
        run: The run.
        sigma: Its noise multiplier.
        validation: Loss on validation facts, nats per token.
        test: Loss on test facts.
        exposure: By repetitions, mean of log2(candidates) - log2(rank) over the planted codes.
        seconds: Of training.
    """

    run: Run
    sigma: float
    validation: float
    test: float
    exposure: dict[str, float]
    seconds: float


# -- facts ---------------------------------------------------------------------------------------

_DEPARTMENTS = (
    "Accounting", "Archives", "Catering", "Design", "Facilities", "Finance", "Legal", "Logistics",
    "Marketing", "Research", "Security", "Training",
)  # fmt: skip
_MANAGERS = (
    "Adler", "Bianchi", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Horvat", "Ito",
    "Jansen", "Kowalski", "Lindgren",
)  # fmt: skip
_SHIFTS = ("early", "late", "night")
_FIRST = (
    "Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Karin",
    "Leo", "Maya", "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sami", "Tara",
)  # fmt: skip
_LAST = (
    "Abbott", "Baker", "Carter", "Dunn", "Ellis", "Foster", "Grant", "Hughes", "Irwin", "Jones",
    "Keller", "Lewis", "Morris", "Nash", "Owens", "Palmer", "Reed", "Shaw", "Turner", "Young",
)  # fmt: skip


def fact(source: random.Random) -> str:
    """Make a fact whose department decides the rest."""
    k = source.randrange(len(_DEPARTMENTS))
    name = f"{source.choice(_FIRST)} {source.choice(_LAST)}"
    return (
        f"{name} works in {_DEPARTMENTS[k]}, floor {k + 1}, for {_MANAGERS[-k]}. "
        f"Shift: {_SHIFTS[k % 3]}. Badge: {source.randrange(10, 100)}."
    )


def door_code(name: str, code: int) -> str:
    """Make a fact that nothing but itself explains."""
    return f"The door code of {name} is {code:06d}."


@dataclass(frozen=True)
class Facts:
    """Texts of a study.

    Attributes:
        train: Units, in random order.
        validation: Facts to choose rates on.
        test: Facts to report.
        codes: By repetitions, the planted (name, code).
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    codes: dict[int, list[tuple[str, int]]] = field(default_factory=dict)


def make_facts(study: Study) -> Facts:
    """Generate the texts."""
    source = random.Random(study.seed)
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    chosen = source.sample(names, study.codes * len(study.repeats))
    codes: dict[int, list[tuple[str, int]]] = {}
    planted: list[str] = []
    for k, repeats in enumerate(study.repeats):
        own = chosen[k * study.codes : (k + 1) * study.codes]
        codes[repeats] = [(name, source.randrange(10**6)) for name in own]
        planted += [door_code(*pair) for pair in codes[repeats] for _ in range(repeats)]
    train = planted + [fact(source) for _ in range(study.units - len(planted))]
    source.shuffle(train)
    held_out = [fact(source) for _ in range(2 * study.held_out)]
    return Facts(train, held_out[: study.held_out], held_out[study.held_out :], codes)


# -- one training --------------------------------------------------------------------------------


def noise_of(study: Study, epsilon: float | None) -> float:
    """Return the noise multiplier of a run."""
    from flashdp.accounting import calibrate

    if epsilon is None:
        return 0.0
    return calibrate(epsilon, study.delta, sample_rate=study.batch / study.units, steps=study.steps)


def train(model_folder: str, device: str, study: Study, run: Run, sigma: float) -> Outcome:
    """Fine-tune adapters, and measure."""
    import torch
    from flashdp import (
        AdamWBC,
        AdaptiveThresholds,
        PrivacyEngine,
        per_sample_loss,
        poisson_data_loader,
    )
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = make_facts(study)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(study.seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=study.rank, lora_alpha=2 * study.rank, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(model, config).to(device)

    def encode(texts: list[str]) -> list[list[int]]:
        return [
            [*ids, tokenizer.eos_token_id]
            for ids in tokenizer(texts, add_special_tokens=False).input_ids
        ]

    def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        # One length for all batches: kernels are compiled once.
        longest = -(-max(len(row) for row in rows) // 16) * 16
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        return {
            "input_ids": labels.clamp(min=0),
            "attention_mask": (labels >= 0).long(),
            "labels": labels,
        }

    def losses_of(batch: dict[str, torch.Tensor], reduction: str = "mean") -> torch.Tensor:
        batch = {key: value.to(device) for key, value in batch.items()}
        labels = batch.pop("labels")
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = model(**batch, use_cache=False).logits
        return per_sample_loss(logits[:, :-1], labels[:, 1:], reduction=reduction)

    @torch.no_grad()
    def losses(texts: list[str], reduction: str) -> torch.Tensor:
        model.eval()
        rows = encode(texts)
        found = [losses_of(collate(rows[k : k + 256]), reduction) for k in range(0, len(rows), 256)]
        return torch.cat(found).cpu()

    def loss(texts: list[str]) -> float:
        tokens = sum(len(row) - 1 for row in encode(texts))
        return float(losses(texts, "sum").double().sum()) / tokens

    private = run.epsilon is not None
    loader = poisson_data_loader(
        encode(facts.train),
        num_steps=study.steps,
        sample_rate=study.batch / study.units,
        secure_rng=False,
        seed=study.seed,
        collate_fn=collate,
        # Room for five standard deviations above the mean: one physical batch, or seldom two.
        max_physical_batch_size=math.ceil(study.batch + 5 * study.batch**0.5),
    )
    options = dict(ARMS.get(run.arm, {}))
    make = AdamWBC if options.pop("corrected", False) else torch.optim.AdamW
    optimizer = make(
        [p for p in model.parameters() if p.requires_grad], lr=run.rate, weight_decay=0.0
    )
    warm = max(1, study.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / warm) * (1 - k / study.steps)
    )
    if private:
        if options.pop("adaptive", False):
            options["thresholds"] = AdaptiveThresholds()
        PrivacyEngine(secure_rng=False, seed=study.seed).make_private(
            model, optimizer, loader, noise_multiplier=sigma, max_grad_norm=study.clip,
            expected_batch_size=study.batch, check_independence=False, **options,
        )  # fmt: skip
    start = time.perf_counter()
    for batch in loader:
        model.train()
        mask, last = loader.current.mask.to(device), loader.current.last
        total = (losses_of(batch) * mask).sum()
        (total if private else total / study.batch).backward()
        if last:
            if not private:
                torch.nn.utils.clip_grad_norm_(model.parameters(), study.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start
    source = random.Random(study.seed + 1)
    exposure = {}
    for repeats, planted in facts.codes.items():
        bits = []
        for name, code in planted:
            others = [source.randrange(10**6) for _ in range(study.candidates - 1)]
            found = losses([door_code(name, c) for c in [code, *others]], "sum")
            rank = 1 + int((found[1:] < found[0]).sum())
            bits.append(math.log2(study.candidates) - math.log2(rank))
        exposure[str(repeats)] = sum(bits) / len(bits)
    return Outcome(run, sigma, loss(facts.validation), loss(facts.test), exposure, seconds)


# -- the study -----------------------------------------------------------------------------------


def best(outcomes: list[Outcome], arm: str, epsilon: float | None) -> Outcome:
    """Return an arm's outcome with the smallest loss on validation facts."""
    own = [o for o in outcomes if (o.run.arm, o.run.epsilon) == (arm, epsilon)]
    return min(own, key=lambda o: o.validation)


def to_do(study: Study, outcomes: list[Outcome]) -> list[Run]:
    """Return the runs that can start: first those that choose rates, then the others."""
    done = {o.run for o in outcomes}
    tuning = [
        Run(arm, study.tuned_at if arm in ARMS else None, rate)
        for arm in (*ARMS, ORDINARY)
        for rate in study.rates
    ]
    if missing := [run for run in tuning if run not in done]:
        return missing
    rest = [
        Run(arm, epsilon, best(outcomes, arm, study.tuned_at).run.rate)
        for arm in ARMS
        for epsilon in study.epsilons
        if epsilon != study.tuned_at
    ]
    return [run for run in rest if run not in done]


def load(path: Path) -> tuple[Study, list[Outcome], dict[str, Any]]:
    """Read a result file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in content["study"].items()}
    outcomes = [Outcome(**{**o, "run": Run(**o["run"])}) for o in content["outcomes"]]
    return Study(**settings), outcomes, content["provenance"]


def save(path: Path, study: Study, outcomes: list[Outcome]) -> None:
    """Write a result file, whole or not at all."""
    from shared_kernels.bench.provenance import describe_run

    content = {
        "benchmark": "utility",
        "study": asdict(study),
        "provenance": describe_run(COMMAND, HERE),
        "outcomes": [asdict(o) for o in sorted(outcomes, key=lambda o: repr(o.run))],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def run_study(model: str, device: str, study: Study, path: Path, jobs: int) -> list[Outcome]:
    """Do all runs that the result file does not hold, several at a time."""
    outcomes: list[Outcome] = []
    if path.is_file():
        before, outcomes, _ = load(path)
        if before != study:
            raise SystemExit(f"{path.name} is of another study: give another --out")
    sigmas = {epsilon: noise_of(study, epsilon) for epsilon in (None, *study.epsilons)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        while runs := to_do(study, outcomes):
            futures = [
                pool.submit(train, model, device, study, run, sigmas[run.epsilon]) for run in runs
            ]
            for future in as_completed(futures):
                outcomes.append(found := future.result())
                save(path, study, outcomes)
                print(
                    f"{found.run.arm}, epsilon {found.run.epsilon}, lr {found.run.rate}: "
                    f"{found.validation:.4f} in {found.seconds:.0f} s",
                    file=sys.stderr,
                )
    return outcomes


# -- what is shown -------------------------------------------------------------------------------


def table(path: Path = RESULT) -> str:
    """Return the README's table and what stands below it."""
    study, outcomes, made = load(path)
    epsilons = sorted(study.epsilons)
    head = ["clipped together", *(f"ε = {e:g}" for e in epsilons), "lr"]
    head += [f"exposure, ε = {epsilons[-1]:g}"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for arm in ARMS:
        found = [best(outcomes, arm, e) for e in epsilons]
        cells = [f"{o.test:.3f}" for o in found]
        cells += [f"{found[0].run.rate:g}", _bits(found[-1].exposure)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    plain = best(outcomes, ORDINARY, None)
    cells = ["", "", f"{plain.test:.3f}"][-len(epsilons) :]
    lines.append(
        f"| {ORDINARY} | {' | '.join(cells)} | {plain.run.rate:g} | {_bits(plain.exposure)} |"
    )
    gpu = (made["gpu"] or {}).get("name", "CPU")
    commit = (made["commit"] or "unknown")[:12]
    lines += [
        "",
        f"{gpu}; torch {made['versions']['torch']}; commit {commit}; {made['date'][:10]}. Remake "
        f"with `{made['command']}`.",
    ]
    return "\n".join(lines)


def _bits(exposure: dict[str, float]) -> str:
    return " / ".join(f"{bits:.1f}" for bits in exposure.values())


def plot(path: Path = RESULT, target: Path = PLOT) -> None:
    """Draw test loss over epsilon."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from shared_kernels.bench.plot import PALETTE

    study, outcomes, _ = load(path)
    epsilons = sorted(study.epsilons)
    with matplotlib.rc_context({"svg.hashsalt": "flashdp", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.5, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for arm, colour, marker in zip(ARMS, PALETTE, "osD^v", strict=False):
            losses = [best(outcomes, arm, e).test for e in epsilons]
            axes.plot(epsilons, losses, marker=marker, color=colour, label=arm)
        axes.axhline(
            best(outcomes, ORDINARY, None).test, color="black", linestyle="--", label=ORDINARY
        )
        axes.set_xscale("log")
        axes.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axes.minorticks_off()
        axes.set_xlabel("epsilon")
        axes.set_ylabel("loss on unseen facts (nats per token)")
        axes.legend(frameon=False)
        figure.savefig(target, metadata={"Date": None})


_BLOCK = re.compile(r"(?<=<!-- utility -->\n).*?(?=^<!-- /utility -->)", re.DOTALL | re.MULTILINE)


def render(text: str, path: Path = RESULT) -> str:
    """Return a README with its table made anew."""
    return _BLOCK.sub(lambda _: table(path) + "\n", text)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure what is missing in the result file")
    run.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    run.add_argument("--device", default="cpu", help="cpu or cuda")
    run.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    run.add_argument("--out", type=Path, default=RESULT, help="result file")
    for name in ("units", "batch", "steps"):
        run.add_argument(f"--{name}", type=int, default=getattr(Study(), name))
    commands.add_parser("report", help="write the README's table and the plot")
    given = parser.parse_args()
    if given.command == "run":
        study = replace(Study(), units=given.units, batch=given.batch, steps=given.steps)
        run_study(given.model, given.device, study, given.out, given.jobs)
    else:
        README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
        plot()


if __name__ == "__main__":
    main()
