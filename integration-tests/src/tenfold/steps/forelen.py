"""The tour's step of forelen: lengths of SmolLM2's answers, and what knowing them is good for."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

if TYPE_CHECKING:
    import numpy as np
    from forelen import LengthDistribution, LengthPredictor
    from forelen.store import Collected

STORE = Path(__file__).parent.parent / "data" / "forelen-mini"
"""Features and lengths of 800 prompts, collected by forelen on a GPU."""
BATCH, SLOTS = 16, 16
PROMPT = "Complete this function.\n\ndef add(a: int, b: int) -> int:\n"


class ForelenStep:
    """Trains on collected answers, reports on new prompts, and watches a live model."""

    name = "forelen"
    title = "how long will the answer be"

    def run(self, context: Context) -> StepResult:
        """Train, calibrate and report; then collect, predict and watch live."""
        from forelen.store import FeatureStore
        from forelen.training import evaluate_collected

        context.progress(0.0, "training a predictor")
        found = FeatureStore(STORE).load()
        train, test = found.split("train"), found.split("test")
        began = time.perf_counter()
        predictor = self._train(context, found, "entropy")
        seconds = time.perf_counter() - began
        constant = float(train.lengths.double().median())
        ours = evaluate_collected(predictor, test, constant=constant)
        context.progress(0.3, "the same with the last token's state")
        last = predictor if context.quick else self._train(context, found, "last")
        by_last = evaluate_collected(last, test, constant=constant)
        ridge = _ridge(train, test)
        if ours.mae >= ours.constant:
            raise StepFailed(f"MAE {ours.mae:.1f} is no better than a constant's {ours.constant}")
        context.progress(0.5, "batches and queues")
        law, lengths = _per_answer(predictor, test)
        padding = _padding(law, lengths)
        spans = _makespans(law, lengths)
        context.progress(0.6, "collecting, predicting and watching live")
        stopped = 100 * float(found.censored.double().mean())
        live = self._live(context, predictor, found)
        levels = list(ours.coverage)

        def draw(axes: Any) -> None:
            nominal = [100 * float(level) for level in levels]
            axes.plot([40, 100], [40, 100], "--", linewidth=1, label="as promised")
            axes.plot(nominal, [100 * ours.coverage[level] for level in levels], "o-",
                      label="on new prompts")  # fmt: skip
            axes.set_xlabel("nominal, %")
            axes.set_ylabel("answers within, %")
            axes.legend()

        from tenfold.plots import svg

        rows = (
            ("the best constant", f"{ours.constant:.1f}"),
            ("ridge on the prompt's length", f"{ridge:.1f}"),
            ("head on the last token's state", f"{by_last.mae:.1f}"),
            ("forelen: entropy-weighted states", f"{ours.mae:.1f}"),
            ("median of the seven other answers", f"{ours.floor:.1f}"),
        )
        return StepResult(
            headline=(
                f"off by {ours.mae:.0f} tokens on new prompts where a constant is off by "
                f"{ours.constant:.0f}, and knowing seven other answers by {ours.floor:.0f}"
            ),
            text=(
                f"SmolLM2-135M-Instruct answered {len(found)} prompts of five kinds eight times "
                f"each at temperature 1, up to 512 tokens ({stopped:.0f} % were stopped there and "
                "are learnt from as lower bounds). Its states of the prompt, weighted by the "
                f"entropy of what each token predicts, train a head in {seconds:.0f} s on "
                f"{len(train)} prompts; the errors are on {ours.prompts} other prompts, in tokens. "
                "The other answers' median is itself noisy, so a predictor can be better.",
                "At temperature 1 this small model's answers to one prompt differ almost as much "
                "as answers to different prompts: most of the error is the model's own dice.",
                live,
            ),
            metrics=(
                Metric("mean absolute error", ours.mae, "tokens", ours.constant, "a constant"),
                Metric("answers in the 90 % interval", 100 * ours.coverage["0.9"], "%", 90.0,
                       "promised"),
                Metric("padding in batches of 16", 100 * padding[1], "%", 100 * padding[0],
                       "random batches"),
                Metric(f"time to finish {SLOTS} at a time, of the least possible",
                       spans["turns"], "", spans["fifo"], "first come, first served", 3),
            ),
            tables=(
                Table("Mean absolute error on new prompts", ("predictor", "tokens"), rows),
                Table(
                    f"Order of a queue, {SLOTS} at a time (makespan over its lower bound)",
                    ("order", "makespan"),
                    tuple((name, f"{value:.3f}") for name, value in spans.items()),
                ),
            ),
            plots=(
                Plot("Coverage", svg(draw, title="Coverage of forelen's intervals"),
                     "How many answers lie in the central interval of each nominal size."),
            ),
        )  # fmt: skip

    def _train(self, context: Context, found: Collected, pooling: str) -> LengthPredictor:
        from forelen.training import calibrate, default_arguments, train

        folder = context.folder / pooling
        arguments = default_arguments(
            folder, True, num_train_epochs=2 if context.quick else 6, disable_tqdm=True,
            logging_strategy="no", weight_decay=0.1, save_strategy="epoch",
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            predictor = train(
                found.split("train"), output_dir=folder, validation=found.split("validation"),
                arguments=arguments, pooling=pooling, dropout=0.3,
            )  # fmt: skip
        return calibrate(predictor, found.split("calibration"))

    def _live(self, context: Context, predictor: LengthPredictor, found: Collected) -> str:
        """Run the model here: the same features, the same tokens with and without watching."""
        import torch
        from forelen.collect import FeatureCollector, Prompt, encode
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tenfold.assets import smollm2

        tokenizer: Any = AutoTokenizer.from_pretrained(smollm2())
        model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
        prompts = _known(found, 1 if context.quick else 8)
        collector = FeatureCollector(
            model, tokenizer, context.folder / "store", num_samples=2, batch_size=4,
            max_new_tokens=4 if context.quick else 24, temperature=1.0, top_p=1.0, top_k=0,
        )  # fmt: skip
        mine = collector.collect([Prompt(text) for text in prompts], progress=False).load()
        places = {key: row for row, key in enumerate(found.hashes.tolist())}
        rows = [places[key] for key in mine.hashes.tolist()]
        key = "entropy.-1.content"
        theirs = found.prompts[key][rows].float()
        error = float((mine.prompts[key] - theirs).norm() / theirs.norm())
        if error > 0.05:
            raise StepFailed(f"features differ from those of the GPU by {error:.1%} of their norm")
        ids = torch.tensor([encode(tokenizer, PROMPT)])
        options = {"max_new_tokens": 4 if context.quick else 32, "do_sample": False}
        plain = model.generate(ids, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with predictor.watch(model) as stream:
                watched = model.generate(ids, **options)
        if not torch.equal(plain, watched):
            raise StepFailed("generate gave other tokens while it was watched")
        if not bool((stream.remaining.quantile(0.5) >= 1).all()):
            raise StepFailed("less than one token was predicted to remain")
        return (
            f"Here, on the CPU, {len(prompts)} of the prompts were asked again: their features are "
            f"those of the GPU's 16-bit run to {100 * error:.1f} % of the norm. A watched generate "
            f"gives the same tokens; after {stream.time} of them the median of what remains went "
            f"from {float(stream.initial.median()):.0f} to {float(stream.remaining.median()):.0f}."
        )


def _known(found: Collected, count: int) -> list[str]:
    """Return prompts that were collected, from the package that ships them."""
    import hashlib

    from forelen.data import mini_prompts

    keys, texts = set(found.hashes.tolist()), []
    for prompt in mini_prompts("Code", 164):
        digest = hashlib.sha256(prompt.text.encode()).digest()[:8]
        if int.from_bytes(digest, "big") >> 1 in keys:
            texts.append(prompt.text)
    return texts[:count]


def _ridge(train: Collected, test: Collected) -> float:
    """Return the error of a ridge regression of log lengths on the prompt's length."""
    import numpy as np

    def design(part: Collected) -> np.ndarray:
        n = np.log1p(part.prompt_tokens.double().numpy())
        return np.stack([np.ones_like(n), n, n**2], 1)

    x, y = design(train), np.log1p(train.lengths.double().numpy()).mean(1)
    weights = np.linalg.solve(x.T @ x + 1e-3 * np.eye(3), x.T @ y)
    guess = np.expm1(design(test) @ weights).clip(1, 512)
    return float(np.abs(guess[:, None] - test.lengths.numpy()).mean())


def _per_answer(
    predictor: LengthPredictor, test: Collected
) -> tuple[LengthDistribution, np.ndarray]:
    """Return a prediction for one answer to each test prompt, and its length."""
    import torch
    from forelen.dataset import LengthDataset
    from forelen.training import predict_rows

    siblings = test.lengths.shape[1]
    rows = torch.arange(len(test)) * siblings
    law = predict_rows(predictor, LengthDataset(test, predictor.config), chosen=rows)
    return law, test.lengths[:, 0].numpy()


def _padding(law: LengthDistribution, lengths: np.ndarray) -> tuple[float, float]:
    """Return the share of padding in random batches and in planned ones."""
    import numpy as np
    from forelen.schedule import padding_ratio, plan_batches

    rng = np.random.default_rng(0)
    random = []
    for _ in range(20):
        order = rng.permutation(len(lengths))
        batches = [order[low : low + BATCH].tolist() for low in range(0, len(order), BATCH)]
        random.append(padding_ratio(batches, lengths))
    return float(np.mean(random)), padding_ratio(plan_batches(law, BATCH), lengths)


def _makespans(law: LengthDistribution, lengths: np.ndarray) -> dict[str, float]:
    """Return makespans over ``max(sum / slots, longest)`` of requests drawn from test prompts."""
    import numpy as np
    from forelen.schedule import Trace, simulate

    means = law.capped_mean(512).numpy()
    rng = np.random.default_rng(0)
    totals: dict[str, list[float]] = {
        name: [] for name in ("fifo", "sjf", "lpt", "lpt, true lengths", "turns")
    }
    for _ in range(20):
        chosen = rng.integers(0, len(lengths), 4 * SLOTS)
        y = lengths[chosen]
        bound = max(y.sum() / SLOTS, y.max())
        for name in totals:
            by = y if "true" in name else means[chosen]
            outcome = simulate(
                Trace.at_once(y), name.split(",")[0], SLOTS, predicted=by, turn=512 // 3
            )
            totals[name].append(outcome.makespan / bound)
    return {name: float(np.mean(values)) for name, values in totals.items()}


STEP = ForelenStep()
