"""The tour's step of sam-if: what a network would be without a sample, foretold and then tried."""

from __future__ import annotations

import math
import time
from typing import Any

from tenfold import plots
from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

_SAMPLES, _BATCH, _FLIPPED, _RADIUS = 300, 50, 30, 0.2


class SamIfStep:
    """Trains on digits with SAM, scores all samples, and trains again without some of them."""

    name = "sam-if"
    title = "which training samples made the model"

    def run(self, context: Context) -> StepResult:
        """Record a run, ask for its influence, and compare with retraining."""
        import torch
        from sam_if import SAM, Trajectory, TrajectoryInfluence, classification
        from scipy.stats import spearmanr
        from sklearn.datasets import load_digits
        from torch.nn.functional import cross_entropy

        steps, tried = (30, 6) if context.quick else (180, 30)
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(pixels) / 16, torch.from_numpy(labels).long()
        draws = torch.Generator().manual_seed(0)
        order = torch.randperm(len(y), generator=draws)
        x, y = x[order], y[order]
        asked = x[-40:], y[-40:]
        x, y = x[:_SAMPLES], y[:_SAMPLES]
        y[:_FLIPPED] = (y[:_FLIPPED] + torch.randint(1, 10, (_FLIPPED,), generator=draws)) % 10
        batches: list[Any] = []
        while len(batches) < steps:
            batches += torch.randperm(_SAMPLES, generator=draws).split(_BATCH)

        def train(without: int | None = None) -> tuple[Trajectory, float]:
            """Return a run in which a sample's places stay empty, and its loss on what is asked."""
            torch.manual_seed(0)
            layers = (torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))
            model = torch.nn.Sequential(*layers).double()
            weights = torch.ones(_SAMPLES, dtype=x.dtype)
            if without is not None:
                weights[without] = 0
            options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
            optimizer = SAM(model.parameters(), torch.optim.SGD, _RADIUS, **options)
            run = Trajectory(model, classification(), optimizer)
            for number, samples in enumerate(batches[:steps]):
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * (1 + math.cos(math.pi * number / steps))
                if without is None:
                    run.record((x[samples], y[samples]), samples)
                for step in (optimizer.first_step, optimizer.second_step):
                    losses = cross_entropy(model(x[samples]), y[samples], reduction="none")
                    (weights[samples] * losses).mean().backward()
                    step(zero_grad=True)
            with torch.no_grad():
                return run, float(cross_entropy(model(asked[0]), asked[1]))

        context.progress(0.0, "training with SAM")
        run, whole = train()
        context.progress(0.1, "going backwards through the run")
        begin = time.perf_counter()
        scores = TrajectoryInfluence(run).scores([asked], mean=True).values[0]
        seconds = time.perf_counter() - begin
        traced = TrajectoryInfluence(run, "none", check=False).scores([asked], mean=True).values[0]
        # of all ranks, so that both who helps and who harms is among them
        ranked = scores.argsort().tolist()
        chosen = [ranked[round(k * (_SAMPLES - 1) / (tried - 1))] for k in range(tried)]
        truth, begin = [], time.perf_counter()
        for done, sample in enumerate(chosen):
            context.progress(0.3 + 0.7 * done / tried, "training again without a sample")
            truth.append(train(sample)[1] - whole)
        once = (time.perf_counter() - begin) / tried
        found, plain = (
            float(spearmanr(told[chosen], truth).statistic) for told in (scores, traced)
        )
        if not context.quick and found < 0.8:
            raise StepFailed(f"retraining is ranked with a correlation of {found:.2f} only")
        worst = ranked[:_FLIPPED]
        hits = sum(sample < _FLIPPED for sample in worst)

        def draw(axes: Any) -> None:
            axes.scatter([1000 * float(scores[n]) for n in chosen], [1000 * t for t in truth])
            axes.axline((0, 0), slope=1, color="gray", linewidth=0.8)
            axes.set_xlabel("foretold change of the loss (thousandths of a nat)")
            axes.set_ylabel("change after training again")

        return StepResult(
            headline=(
                f"{_SAMPLES} samples scored in {seconds:.1f} s; training again without "
                f"{tried} of them agrees with a rank correlation of {found:.2f}"
            ),
            text=(
                f"A network learns {_SAMPLES} handwritten digits by sharpness-aware minimisation, "
                f"{_FLIPPED} of them with wrong labels. Its run is gone through backwards once, "
                "exactly, which says for every sample how the loss on 40 other digits would change "
                "without it. Then it is trained again without some, with their places in batches "
                "left empty.",
                f"Of the {_FLIPPED} samples that harm most, {hits} have a wrong label.",
            ),
            metrics=(
                Metric("rank correlation with retraining", found, "", plain,
                       "tracing gradients, without Hessians", 2),
                Metric("scores of all samples", seconds, "s", once * _SAMPLES,
                       "training again without each, from the time of some"),
            ),
            tables=(
                Table("Samples that harm most", ("sample", "digit as labelled", "change without"),
                      tuple((str(n), str(int(y[n])), f"{float(scores[n]):+.5f}")
                            for n in worst[:8])),
            ),
            plots=(
                Plot("Foretold and tried", plots.svg(draw, title="Leaving one out"),
                     "Each point is a sample; on the line both are the same."),
            ),
        )  # fmt: skip


STEP = SamIfStep()
