"""The tour's step of sam-if: what a sample did to a network, and which labels are wrong."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from tenfold import plots
from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam_if import Trajectory
    from torch import Generator, Tensor

_SAMPLES, _BATCH, _FLIPPED = 300, 50, 30
#: What each digit is taken for, from 0 to 9, and how often.
_MISTAKEN, _NOISE = (6, 7, 5, 8, 9, 2, 0, 1, 3, 4), 0.3
_LOOKED, _ACROSS, _DOWN = 30, 10, 3
OURS, LOSS, TRACED, PLAIN = "margins of the run", "final loss", "gradient tracing", "influence"
LINEAR, NEAR = "logistic regression", "10 neighbours"


def _digits(draws: Generator) -> tuple[Tensor, Tensor]:
    """Return handwritten digits of 64 pixels from 0 to 1, in a random order, and their labels."""
    import torch
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=draws)
    return (torch.from_numpy(pixels) / 16)[order], torch.from_numpy(labels).long()[order]


def _train(
    x: Tensor, y: Tensor, steps: int, draws: Generator, radius: float, rate: float
) -> Trajectory:
    """Train a network by SAM, at a rate that falls to 0, and return the record."""
    import torch
    from sam_if import SAM, Trajectory, classification

    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))
    model = torch.nn.Sequential(*layers).double()
    options: dict[str, Any] = {"lr": rate, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = SAM(model.parameters(), torch.optim.SGD, radius, **options)
    run = Trajectory(model, classification(), optimizer)
    batches: list[Any] = []
    while len(batches) < steps:
        batches += torch.randperm(len(y), generator=draws).split(_BATCH)
    for number, samples in enumerate(batches[:steps]):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * number / steps)) / 2
        run.step((x[samples], y[samples]), samples)
    return run


def _left_out(context: Context) -> StepResult:
    """Foretell what the loss would be without each sample, and train again without some."""
    import torch
    from sam_if import TrajectoryInfluence
    from scipy.stats import spearmanr

    steps, tried = (30, 6) if context.quick else (180, 30)
    draws = torch.Generator().manual_seed(0)
    x, y = _digits(draws)
    asked = x[-40:], y[-40:]
    x, y = x[:_SAMPLES], y[:_SAMPLES]
    y[:_FLIPPED] = (y[:_FLIPPED] + torch.randint(1, 10, (_FLIPPED,), generator=draws)) % 10
    context.progress(0.0, "training with SAM")
    run = _train(x, y, steps, draws, 0.2, 0.1)
    context.progress(0.1, "going backwards through the run")
    begin = time.perf_counter()
    scores = TrajectoryInfluence(run).scores([asked], mean=True).values[0]
    seconds = time.perf_counter() - begin
    traced = TrajectoryInfluence(run, "none", check=False).scores([asked], mean=True).values[0]
    # of all ranks, so that both who helps and who harms is among them
    ranked = scores.argsort().tolist()
    chosen = [ranked[round(k * (_SAMPLES - 1) / (tried - 1))] for k in range(tried)]

    def loss(weights: Tensor) -> float:
        return float(run.vector.losses(weights, asked).mean())

    whole = loss(run.weights)
    truth, begin = [], time.perf_counter()
    for done, sample in enumerate(chosen):
        context.progress(0.2 + 0.4 * done / tried, "training again without a sample")
        truth.append(loss(run.retrain([sample])) - whole)
    once = (time.perf_counter() - begin) / tried
    found, plain = (float(spearmanr(told[chosen], truth).statistic) for told in (scores, traced))
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
            f"{_SAMPLES} samples scored in {seconds:.1f} s agree with training again without "
            f"{tried} of them, by a rank correlation of {found:.2f}"
        ),
        text=(
            f"A network learns {_SAMPLES} handwritten digits by sharpness-aware minimisation, "
            f"{_FLIPPED} of them with wrong labels. Its run is gone through backwards once, "
            "exactly, which says for every sample how the loss on 40 other digits would change "
            "without it. Then it is trained again without some, with their places in batches "
            f"left empty. Of the {_FLIPPED} samples that harm most, {hits} have a wrong label.",
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


def _suspicions(
    run: Trajectory, x: Tensor, y: Tensor, context: Context
) -> dict[str, tuple[Tensor, float]]:
    """Return each method's scores, the larger the more suspicious, and the seconds they took."""
    import torch
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sam_if import HessianInfluence, SAMField, TrajectoryInfluence, classification
    from sam_if.detect import detect_mislabels
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    pixels, labels = x.numpy(), y.numpy()
    chances: dict[str, Any] = {}

    def influence() -> Tensor:
        field = SAMField(run.model, classification(), [(x, y)], 0.0, mode="frozen")
        return HessianInfluence(field, "ekfac", damping=0.1).self_influence()

    def traced() -> Tensor:
        through = TrajectoryInfluence(run, "none", check=False)
        return through.self_influence(range(len(y)), together=len(y))

    def held_out(name: str, model: Any) -> Tensor:
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        chances[name] = cross_val_predict(model, pixels, labels, cv=folds, method="predict_proba")
        found = torch.from_numpy(chances[name])
        own = found.gather(1, y[:, None])
        return found.scatter(1, y[:, None], -1).amax(1) - own[:, 0]

    def cleaned(name: str) -> Tensor:
        """Return cleanlab's order: the issues that it finds first, then by its quality."""
        issues = find_label_issues(labels, chances[name], n_jobs=1)
        quality = get_label_quality_scores(labels, chances[name], method="normalized_margin")
        return torch.from_numpy(issues - quality / 2)

    methods: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: detect_mislabels(run).values(len(y)),
        LOSS: lambda: detect_mislabels(run, "loss").values(len(y)),
        PLAIN: influence,
        TRACED: traced,
        LINEAR: lambda: held_out(LINEAR, LogisticRegression(max_iter=1000)),
        f"cleanlab, {LINEAR}": lambda: cleaned(LINEAR),
        NEAR: lambda: held_out(NEAR, KNeighborsClassifier(10)),
        f"cleanlab, {NEAR}": lambda: cleaned(NEAR),
    }
    made: dict[str, tuple[Tensor, float]] = {}
    for done, (name, method) in enumerate(methods.items()):
        context.progress(0.6 + 0.4 * done / len(methods), f"wrong labels: {name}")
        begin = time.perf_counter()
        scores = method()
        seconds = time.perf_counter() - begin
        if name.startswith("cleanlab, "):
            seconds += made[name.removeprefix("cleanlab, ")][1]
        made[name] = scores, seconds
    return made


def _wrong_labels(context: Context) -> StepResult:
    """Give digits the labels of similar ones, and look for them by all methods."""
    import torch
    from sam_if.detect import detect_mislabels
    from sam_if.evaluate import auroc

    draws = torch.Generator().manual_seed(0)
    pixels, digits = _digits(draws)
    x, truth = pixels[:_SAMPLES], digits[:_SAMPLES]
    wrong = torch.rand(_SAMPLES, generator=draws) < _NOISE
    y = torch.where(wrong, torch.tensor(_MISTAKEN)[truth], truth)
    long, short = (30, 15) if context.quick else (300, 150)
    begin = time.perf_counter()
    run = _train(x, y, long, draws, 0.1, 0.3)
    seconds = time.perf_counter() - begin
    stopped = _train(x, y, short, draws, 0.1, 0.3)

    def by_heart(run: Trajectory) -> float:
        with torch.no_grad():
            return float((run.model(x).argmax(1) == y)[wrong].double().mean())

    made = _suspicions(run, x, y, context)
    judged = {name: auroc(scores, wrong, [_LOOKED]) for name, (scores, _) in made.items()}
    early = {
        score: auroc(detect_mislabels(stopped, score).values(_SAMPLES), wrong).auroc
        for score in ("margin", "loss")
    }
    ours = judged[OURS].auroc
    for name in (LOSS, TRACED, PLAIN):
        if not context.quick and ours <= judged[name].auroc:
            raise StepFailed(f"{OURS} find {ours:.3f}, {name} {judged[name].auroc:.3f}")
    order = sorted(judged, key=lambda name: -judged[name].auroc)
    first = order[0]
    rival = first if first != OURS else order[1]
    worst = made[OURS][0].argsort(descending=True, stable=True)[:_LOOKED]
    return StepResult(
        headline=(
            f"wrong labels are best found by {first} (AUROC {judged[first].auroc:.3f}); "
            f"{OURS} have {ours:.3f}, the {LOSS} {judged[LOSS].auroc:.3f}"
        ),
        text=(
            f"Then {int(wrong.sum())} of {_SAMPLES} digits get the label of one that looks like "
            "them: 3 and 8, 4 and 9, 1 and 7, 0 and 6, 2 and 5 are taken for each other. The "
            f"network is trained on them in {seconds:.1f} s until it has learnt "
            f"{by_heart(run):.0%} of the wrong labels by heart. Four methods look at that run: "
            "margins at how late it believed each label, the others at its end or its gradients. "
            "Logistic regression and nearest neighbours are trained on the pixels alone, in five "
            "folds, and cleanlab orders what they say of the samples that each fold left out. "
            "Seconds are beside the network's training; of equal scores a part counts.",
            "Intervals are 95 % ones over samples; methods inside each other's cannot be told "
            "apart here, and another draw of the noise may order them differently. Of a run of "
            f"half the steps, which has learnt {by_heart(stopped):.0%} of them by heart, margins "
            f"have {early['margin']:.3f} and the final loss {early['loss']:.3f}: the less is "
            "learnt by heart, the less margins are ahead. They take no training beside the run; "
            "where a simple model is good at the task, as on these digits, cross-validate it too.",
        ),
        metrics=(
            Metric("AUROC of wrong labels, by margins", ours, "", judged[rival].auroc,
                   f"best of the others: {rival}", 3),
            Metric(f"wrong ones of the first {_LOOKED}, by margins",
                   _LOOKED * judged[OURS].precision[_LOOKED], "",
                   _LOOKED * judged[LOSS].precision[_LOOKED], LOSS, 0),
        ),
        tables=(
            Table(
                "Finding wrong labels",
                ("method", "AUROC", "95 %", f"wrong of the first {_LOOKED}", "seconds"),
                tuple(
                    (name, f"{judged[name].auroc:.3f}",
                     "{:.3f} to {:.3f}".format(*judged[name].interval),
                     f"{_LOOKED * judged[name].precision[_LOOKED]:.3g}", f"{made[name][1]:.2f}")
                    for name in order
                ),
            ),
        ),
        plots=(
            _search({name: made[name][0] for name in (OURS, NEAR, LINEAR, TRACED, LOSS)}, wrong),
            _pictures(pixels[worst], y[worst], truth[worst]),
        ),
    )  # fmt: skip


def _search(scores: dict[str, Tensor], wrong: Tensor) -> Plot:
    count, total = len(wrong), int(wrong.sum())

    def draw(axes: Any) -> None:
        axes.plot([0, total, count], [0, total, total], color="gray", linewidth=0.8)
        axes.plot([0, count], [0, total], color="gray", linewidth=0.8, linestyle=":")
        for (name, values), color in zip(scores.items(), plots.PALETTE, strict=False):
            order = values.argsort(descending=True, stable=True)
            found = [0, *wrong[order].cumsum(0).tolist()]
            width = 2.5 if name == OURS else 1.2
            axes.plot(found, label=name, color=color, linewidth=width)
        axes.set_xlabel("labels looked at, the most suspicious first")
        axes.set_ylabel("wrong ones found")
        axes.set_xlim(0, count)
        axes.set_ylim(0, total * 1.04)
        axes.legend(loc="lower right")

    title = "Wrong labels found"
    told = "Grey: knowing all, and knowing nothing. The earlier a line rises the less is looked at."
    return Plot(title, plots.svg(draw, title=title), told)


def _pictures(pixels: Tensor, given: Tensor, truth: Tensor) -> Plot:
    def draw(axes: Any) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        ink = axes.xaxis.label.get_color()
        corners = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
        squares: dict[int, list[Any]] = {}
        for number, picture in enumerate((pixels * 16).int().tolist()):
            left, top = 11 * (number % _ACROSS), 12 * (number // _ACROSS)
            for place, shade in enumerate(picture):
                a, b = left + place % 8, top + place // 8
                squares.setdefault(shade, []).append([(a + i, b + j) for i, j in corners])
            label, digit = int(given[number]), int(truth[number])
            right, color = label == digit, plots.PALETTE[1]
            text = f"{label} is right" if right else f"“{label}” is {digit}"
            axes.text(left + 4, top + 10, text, ha="center", fontsize=9,
                      color=color if right else ink)  # fmt: skip
        # a path for each shade, which the page's colour fills
        for shade in sorted(squares.keys() - {0}):
            path = Path.make_compound_path(*map(Path, squares[shade]))
            axes.add_patch(PathPatch(path, color=ink, alpha=shade / 16, linewidth=0))
        axes.set_xlim(-1, 11 * _ACROSS - 2)
        axes.set_ylim(12 * _DOWN, -0.5)
        axes.set_aspect("equal")
        axes.axis("off")

    title = "Most suspicious digits"
    alarms = int((given == truth).sum())
    told = (
        f"The {len(given)} digits that margins suspect most: the label given, and what it is; "
        f"labelled right among them: {alarms}."
    )
    return Plot(title, plots.svg(draw, title=title, size=(6.4, 2.4)), told)


class SamIfStep:
    """Trains on digits with SAM, scores samples, trains without some, and finds wrong labels."""

    name = "sam-if"
    title = "which training samples made the model, and which are labelled wrong"

    def run(self, context: Context) -> StepResult:
        """Do both, and put them together."""
        one, two = _left_out(context), _wrong_labels(context)
        return StepResult(
            f"{one.headline}; {two.headline}", one.text + two.text, one.metrics + two.metrics,
            one.tables + two.tables, one.plots + two.plots,
        )  # fmt: skip


STEP = SamIfStep()
