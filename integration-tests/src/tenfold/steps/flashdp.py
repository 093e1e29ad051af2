"""The tour's step of flashdp: fine-tune SmolLM2 on private text, and what privacy costs."""

from __future__ import annotations

import copy
import importlib.util
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

EPSILON, DELTA, CLIP, SEED = 8.0, 1e-5, 1.0, 0
LENGTH = 32
"""Tokens kept of a document."""
STEPS, BATCH, PHYSICAL, HELD = 4, 32, 16, 32
RANK = 16
ROWS, TOKENS, VOCABULARY = 2, 128, 49000
"""Of the step that is timed."""
LEAST_GAIN = 0.1
"""Nats per token that every run must learn, or the step fails; ten times what runs differ by."""


@dataclass(frozen=True)
class Recipe:
    """How one kind of fine-tuning is done.

    Attributes:
        name: In the report.
        rank: Of the adapters on all matrices of the decoder; 0 trains every parameter.
        private_lr: Adam's learning rate with privacy. Each rate is the best of three or four, a
            factor of two or three apart, on the ``HELD`` held-out documents after those reported.
        ordinary_lr: Without.
    """

    name: str
    rank: int
    private_lr: float
    ordinary_lr: float


RECIPES = (
    Recipe("LoRA", RANK, private_lr=2e-2, ordinary_lr=1e-3),
    Recipe("all weights", 0, private_lr=2e-3, ordinary_lr=3e-4),
)


@dataclass(frozen=True)
class Plan:
    """What all runs share.

    Attributes:
        steps: Optimizer steps.
        batch: Expected documents of a step.
        rate: Probability with which each document enters a step.
        sigma: Noise multiplier.
        epsilon: Of each document, after 0, 1, ... steps.
    """

    steps: int
    batch: int
    rate: float
    sigma: float
    epsilon: tuple[float, ...]

    @classmethod
    def make(cls, documents: int, *, quick: bool) -> Plan:
        """Find the noise, and what each step of it costs."""
        import flashdp

        steps, batch = (1, 4) if quick else (STEPS, BATCH)
        rate = batch / documents
        # The Rényi accountant finds the noise in a second, a little more than is needed; what was
        # spent is then stated by the tight one.
        sigma = flashdp.calibrate(EPSILON, DELTA, sample_rate=rate, steps=steps, kind="rdp")
        accountant, spent = flashdp.Accountant("pld"), [0.0]
        for _ in range(steps):
            accountant.step(flashdp.Mechanism(noise_multiplier=sigma, sample_rate=rate))
            spent.append(accountant.epsilon(DELTA))
        return cls(steps, batch, rate, sigma, tuple(spent))


@dataclass
class Run:
    """What became of one training run.

    Attributes:
        held: Loss on held-out documents after so many steps, nats per token.
        seen: Loss of each step's own documents before that step.
        trained: Parameters.
        groups: Clipping groups.
    """

    held: dict[int, float] = field(default_factory=dict)
    seen: list[float] = field(default_factory=list)
    trained: int = 0
    groups: int = 0


@dataclass(frozen=True)
class Data:
    """Tokens of documents; ``held`` in batches."""

    training: list[list[int]]
    held: list[dict[str, Any]]

    @classmethod
    def read(cls, tokenizer: PreTrainedTokenizerBase, *, quick: bool) -> Data:
        """Read the documents."""
        from tenfold.tasks import docstrings

        training, held = docstrings.load(files=40 if quick else None)
        if quick:
            training, held = training[:300], held[:4]
        # By length: draws come in the order of the data, so that a batch is filled up little.
        rows = [
            sorted(docstrings.encode(texts, tokenizer, LENGTH), key=len)
            for texts in (training, held[:HELD])
        ]
        parts = [rows[1][k : k + PHYSICAL] for k in range(0, len(rows[1]), PHYSICAL)]
        return cls(rows[0], [docstrings.batch(part) for part in parts])


class FlashDPStep:
    """See the module's docstring."""

    name = "flashdp"
    title = "Fine-tune a language model on private text with a guarantee"

    def run(self, context: Context) -> StepResult:
        """Fine-tune with and without privacy, adapters and all weights; time steps."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        from tenfold import assets

        logging.disable_progress_bar()
        context.progress(0.0, "unpacking SmolLM2-135M (once, half a minute)")
        tokenizer: Any = AutoTokenizer.from_pretrained(assets.smollm2())
        context.progress(0.02, "reading the standard library's docstrings")
        data = Data.read(tokenizer, quick=context.quick)
        context.progress(0.05, "finding the noise")
        plan = Plan.make(len(data.training), quick=context.quick)
        context.progress(0.08, "asking the model before")
        before = _loss(_model(None), data)
        recipes = [r for r in RECIPES if not r.rank or _has_peft()][: 1 if context.quick else None]
        runs: dict[str, tuple[Run, Run]] = {}
        start, share = 0.1, 0.6 / (2 * len(recipes))
        for recipe in recipes:
            pair = []
            for private in (True, False):
                pair.append(_train(recipe, data, plan, context, (start, share), private=private))
                pair[-1].held[0] = before
                start += share
            runs[recipe.name] = (pair[0], pair[1])
        if not context.quick:
            _judge(runs, plan)
        speeds = [_speed(recipe, context) for recipe in recipes]
        return _result(data, plan, runs, dict(zip(runs, speeds, strict=True)))


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _judge(runs: dict[str, tuple[Run, Run]], plan: Plan) -> None:
    """Fail if a run did not learn."""
    for name, pair in runs.items():
        for kind, run in zip(("private", "ordinary"), pair, strict=True):
            if not run.held[plan.steps] <= run.held[0] - LEAST_GAIN:
                raise StepFailed(
                    f"expected {kind} fine-tuning ({name}) to lower the held-out loss by "
                    f"{LEAST_GAIN} nats per token, it went from {run.held[0]:.2f} to "
                    f"{run.held[plan.steps]:.2f} in {plan.steps} steps"
                )


def _model(rank: int | None) -> nn.Module:
    """SmolLM2; ``None`` for asking only, 0 to train all of it, else adapters of that rank."""
    import torch
    from transformers import AutoModelForCausalLM

    from tenfold import assets

    model: Any = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    if rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        model = get_peft_model(
            model,
            LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    return model


def _train(
    recipe: Recipe, data: Data, plan: Plan, context: Context, span: tuple[float, float], *,
    private: bool,
) -> Run:  # fmt: skip
    import flashdp
    import torch
    from flashdp.losses import unit_loss

    from tenfold.tasks import docstrings

    model: Any = _model(recipe.rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = recipe.private_lr if private else recipe.ordinary_lr
    optimizer = torch.optim.Adam(trained, lr=lr)
    # The same seed draws the same documents for both.
    loader = flashdp.poisson_data_loader(
        data.training, num_steps=plan.steps, expected_batch_size=plan.batch, public_n="dataset",
        max_physical_batch_size=min(PHYSICAL, plan.batch), secure_rng=False, seed=SEED,
        collate_fn=docstrings.batch,
    )  # fmt: skip
    run, engine = Run(trained=sum(p.numel() for p in trained)), None
    if private:
        engine = flashdp.PrivacyEngine(secure_rng=False, seed=SEED)
        engine.make_private(
            model, optimizer, loader, noise_multiplier=plan.sigma, max_grad_norm=CLIP,
            expected_batch_size=plan.batch,
        )  # fmt: skip
        run.groups = len(engine.calibration.thresholds)
    total, count = 0.0, 0
    for inputs in loader:
        assert loader.current is not None
        real, last = loader.current.mask, loader.current.last
        # What fills up a batch has no labels; the private engine leaves it out by itself as well.
        labels = inputs["labels"].masked_fill(~real[:, None], -100)
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = unit_loss(logits, labels)
        # The engine divides by the public batch size itself.
        (loss if private else loss / plan.batch).backward()
        total, count = total + loss.item(), count + int(real.sum())
        if not last:
            continue
        optimizer.step()
        optimizer.zero_grad()
        done = loader.steps_done
        run.seen.append(total / max(count, 1))
        total, count = 0.0, 0
        context.progress(
            span[0] + span[1] * done / plan.steps,
            f"{recipe.name}, {'private' if private else 'ordinary'}: step {done} of {plan.steps}, "
            f"loss {run.seen[-1]:.2f}",
        )
        if done in (plan.steps // 2, plan.steps):
            run.held[done] = _loss(model, data)
    if engine is not None:
        engine.detach()
    return run


def _loss(model: nn.Module, data: Data) -> float:
    """Mean over held-out documents of each one's loss per token."""
    import torch
    from flashdp.losses import unit_loss

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.held:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            total += unit_loss(logits, batch["labels"]).item()
            count += len(batch["labels"])
    return total / count


@dataclass(frozen=True)
class Speed:
    """Median tokens per second of each arm, and of which step."""

    tokens: dict[str, float]
    rows: int
    length: int
    rounds: int


def _speed(recipe: Recipe, context: Context) -> Speed:
    """Time interleaved steps of one recipe on one batch."""
    import torch
    from shared_kernels.bench import Plan as Rounds
    from shared_kernels.bench import measure

    from tenfold import private_steps

    context.progress(0.75 if recipe.rank else 0.85, f"{recipe.name}: timing steps")
    rows, length = (2, 8) if context.quick else (ROWS, TOKENS)
    ids = torch.randint(
        0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(SEED)
    )
    # Copies are not in the memory-mapped file, whose pages would be read while time is taken.
    model = _untied(recipe.rank)
    work = private_steps.workload(recipe.name, lambda: copy.deepcopy(model), ids)
    try:
        work.check()
    except AssertionError as error:
        raise StepFailed(f"{recipe.name}: {error}") from error
    rounds = 1 if context.quick else 3
    found = measure(work, Rounds(warmup=1, min_rounds=rounds, max_rounds=rounds, min_seconds=0.0))
    medians = {name: rows * length / statistics.median(arm.seconds) for name, arm in found.items()}
    return Speed(medians, rows, length, rounds)


def _untied(rank: int) -> nn.Module:
    """Opacus takes no tied weights that are trained: the head gets a copy of its own."""
    import torch

    model: Any = _model(rank)
    if not rank:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model.train()


def _result(
    data: Data, plan: Plan, runs: dict[str, tuple[Run, Run]], speeds: dict[str, Speed]
) -> StepResult:
    from tenfold import private_steps as steps

    spent, last = plan.epsilon[-1], plan.steps
    before = next(iter(runs.values()))[0].held[0]
    metrics = [
        Metric(f"Held-out loss, {name}, nats per token (before: {before:.2f})",
               private.held[last], "", ordinary.held[last], "without privacy", digits=2)
        for name, (private, ordinary) in runs.items()
    ]  # fmt: skip
    metrics.append(Metric(f"ε of each document at δ = {DELTA:g}", spent, "", digits=2))
    metrics += [
        Metric(f"Speed of a private step, {name}", speed.tokens[steps.FLASHDP], "tokens/s",
               speed.tokens[steps.ORDINARY], "without privacy", digits=0)
        for name, speed in speeds.items()
    ]  # fmt: skip
    return StepResult(
        headline=_headline(before, spent, last, runs, speeds),
        text=_text(data, plan, speeds),
        metrics=tuple(metrics),
        tables=(_losses(runs, last), _times(speeds), _settings(data, plan, runs)),
        plots=(_loss_plot(runs), _epsilon_plot(plan)),
    )


def _headline(
    before: float, spent: float, last: int, runs: dict[str, tuple[Run, Run]],
    speeds: dict[str, Speed],
) -> str:  # fmt: skip
    from tenfold import private_steps as steps

    name, (private, ordinary) = next(iter(runs.items()))
    timed, speed = list(speeds.items())[-1]
    full = speed.tokens
    ours, plain = full[steps.FLASHDP], full[steps.ORDINARY]
    beside = f"{100 * ours / plain:.0f} % of the ordinary speed"
    peers = [full[k] for k in (steps.HOOKS, steps.GHOST) if k in full]
    if peers:
        beside += f" and {ours / max(peers):.1f} times Opacus's"
    return (
        f"With ε = {spent:.1f} for every document, {_steps(last)} of {name} took SmolLM2-135M's "
        f"held-out loss from {before:.2f} to {private.held[last]:.2f} (without privacy: "
        f"{ordinary.held[last]:.2f}); a private step of {timed} runs at {beside}."
    )


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _text(data: Data, plan: Plan, speeds: dict[str, Speed]) -> tuple[str, ...]:
    from tenfold import private_steps as steps

    speed = list(speeds.values())[-1]
    told = [
        f"The privacy unit is one document: a docstring of Python's standard library, "
        f"{len(data.training):,} of them, cut to {LENGTH} tokens. Data sets are neighbours if one "
        f"has one document more than the other. Each of {plan.steps} steps draws every document "
        f"with probability {plan.rate:.4f}; each layer's part of a document's gradient is clipped "
        f"inside the backward pass, and Gaussian noise of multiplier {plan.sigma:.3f} is added "
        f"to the sums. Whoever sees the trained weights, knowing all other documents, can hardly "
        f"tell whether a given one was there: ε = {plan.epsilon[-1]:.2f} at δ = {DELTA:g}.",
        f"The noise was chosen for ε = {EPSILON:g} by the Rényi accountant, which is fast; what "
        "was spent is stated by dp-accounting's tight one (PLD). The run is seeded and repeats; a "
        "real one draws its noise and its batches from the operating system's generator. The "
        "losses printed here, and the learning rates, each the best of three or four on other "
        "documents that were held out, are outside the guarantee.",
        f"Speeds are medians of {speed.rounds} interleaved steps of {speed.rows} rows of "
        f"{speed.length} random tokens: forward, backward, clipping, noise and SGD, in float32. "
        "Opacus refuses weights that are tied and trained, so that in every arm of “all weights” "
        "the head has a copy of the embedding's weight; nothing else was changed. “Hooks” form "
        "one gradient per row and clip each parameter; ghost clipping runs backward twice and "
        "knows one threshold only. On so small a batch the passes over the weights, noise "
        "among them, count for more than on a GPU's.",
    ]  # fmt: skip
    if not steps.has_opacus():
        told.append("Opacus is not installed, so that its speeds are missing: pip install opacus.")
    if not _has_peft():
        told.append("PEFT is not installed, so that LoRA was left out: pip install peft.")
    return tuple(told)


def _losses(runs: dict[str, tuple[Run, Run]], last: int) -> Table:
    rows = []
    for name, pair in runs.items():
        for kind, run in zip(("private", "without privacy"), pair, strict=True):
            rows.append(
                (f"{name}, {kind}", f"{run.trained / 1e6:.1f} M", f"{run.held[0]:.3f}",
                 f"{run.held[last]:.3f}", f"{run.held[last] - run.held[0]:+.3f}")
            )  # fmt: skip
    columns = ("training", "parameters", "held-out loss before", "after", "change")
    return Table("Nats per token on held-out documents", columns, tuple(rows))


def _times(speeds: dict[str, Speed]) -> Table:
    from tenfold import private_steps as steps

    rows = []
    for name, speed in speeds.items():
        plain, ours = speed.tokens[steps.ORDINARY], speed.tokens[steps.FLASHDP]
        for arm, rate in speed.tokens.items():
            rows.append(
                (f"{name}, {arm}", f"{rate:.0f}", f"{100 * rate / plain:.0f} %",
                 "" if arm in (steps.ORDINARY, steps.FLASHDP) else f"{ours / rate:.2f}")
            )  # fmt: skip
    columns = ("step", "tokens per second", "of the ordinary speed", "flashdp over it")
    return Table("Speed of a step", columns, tuple(rows))


def _settings(data: Data, plan: Plan, runs: dict[str, tuple[Run, Run]]) -> Table:
    rows = {
        "documents to train on, to judge by": f"{len(data.training):,}, "
        f"{sum(len(batch['labels']) for batch in data.held)}",
        "steps, expected batch": f"{plan.steps}, {plan.batch} documents",
        "clipping": f"C = {CLIP:g}, shared over layers",
        "noise multiplier": f"{plan.sigma:.3f}",
        "optimizer": "Adam, in every run",
    }
    for recipe in RECIPES:
        if recipe.name in runs:
            rows[f"{recipe.name}: learning rate, private and ordinary"] = (
                f"{recipe.private_lr:g}, {recipe.ordinary_lr:g}"
            )
            rows[f"{recipe.name}: clipping groups"] = str(runs[recipe.name][0].groups)
    return Table("Settings", ("", ""), tuple(rows.items()))


def _loss_plot(runs: dict[str, tuple[Run, Run]]) -> Plot:
    from tenfold.plots import PALETTE, svg

    def draw(axes: Any) -> None:
        for colour, (name, pair) in zip(PALETTE, runs.items(), strict=False):
            for run, style, kind in zip(pair, ("-", "--"), ("private", "ordinary"), strict=True):
                axes.plot(
                    *zip(*sorted(run.held.items()), strict=True), color=colour, marker="o",
                    linestyle=style, label=f"{name}, {kind}",
                )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.legend(fontsize="small")

    return Plot(
        "Loss on held-out documents",
        svg(draw, title="Loss on held-out docstrings by step, with and without privacy"),
        "The same documents, batches and optimizer; each run at a learning rate of its own.",
    )


def _epsilon_plot(plan: Plan) -> Plot:
    from tenfold.plots import PALETTE, svg

    def draw(axes: Any) -> None:
        axes.plot(range(plan.steps + 1), plan.epsilon, color=PALETTE[0], marker="o", label="spent")
        axes.axhline(EPSILON, color=PALETTE[5], linestyle="--", label="budget")
        axes.set_xlabel("step")
        axes.set_ylabel("ε")
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(plan.steps + 1))
        axes.legend(fontsize="small")

    return Plot(
        "Privacy spent",
        svg(draw, title="Epsilon of each document by step"),
        f"ε of each document at δ = {DELTA:g}; the first step costs the most.",
    )


STEP = FlashDPStep()
