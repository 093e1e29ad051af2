"""The tour's step of flashdp: learn from private texts, and what privacy costs in time."""

from __future__ import annotations

import statistics
import time
from typing import Any

from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

STEPS, BATCH, LR, CLIP = 60, 128, 4e-3, 1.0
EPSILON, DELTA, SEED = 8.0, 1e-5, 0
TIMED, ROWS, TOKENS = 3, 4, 64
MOST_LOSS = 3.3
"""Nats per byte that private training must get below, or the step fails; untrained it is 5.6."""


class FlashDPStep:
    """See the module's docstring."""

    name = "flashdp"
    title = "Train on private text with a guarantee, at nearly the speed of ordinary training"

    def run(self, context: Context) -> StepResult:
        """Train a small model on docstrings with and without privacy; time SmolLM2's steps."""
        import torch

        from tenfold.tasks import docstrings

        context.progress(0.0, "reading the standard library's docstrings")
        texts, held = docstrings.load()
        steps = 6 if context.quick else STEPS
        if context.quick:
            texts, held = texts[:2000], held[:100]
        test = docstrings.batch(held[:500])
        curves: dict[str, list[tuple[int, float]]] = {}
        spent: dict[str, Any] = {}
        for k, name in enumerate(("private", "ordinary")):
            torch.manual_seed(SEED)
            model = _small_model()
            offset = 0.05 + 0.3 * k
            curves[name] = _train(
                model, texts, test, steps, name, spent,
                lambda share, text, offset=offset: context.progress(offset + 0.3 * share, text),
            )  # fmt: skip
        context.progress(0.65, "timing SmolLM2-135M's steps")
        seconds = _time_smollm2(context, quick=context.quick)
        private, ordinary = curves["private"][-1][1], curves["ordinary"][-1][1]
        if not context.quick and private > MOST_LOSS:
            raise StepFailed(
                f"expected private training to reach {MOST_LOSS} nats per byte, it is at "
                f"{private:.2f} after {steps} steps"
            )
        share = 100 * seconds["ordinary"] / seconds["flashdp"]
        return StepResult(
            headline=(
                f"Learning from {len(texts):,} texts with ε = {spent['epsilon']:.1f} for each of "
                f"them; a private step of SmolLM2-135M runs at {share:.0f} % of the ordinary speed."
            ),
            text=(
                f"The privacy unit is one docstring of Python's standard library. Each of {steps} "
                f"steps draws every text with probability {spent['rate']:.4f}; each layer's part "
                f"of a text's gradient is clipped inside the backward pass, and Gaussian noise of "
                f"multiplier {spent['sigma']:.2f} is added to the sums. Whoever sees the trained "
                f"model, knowing all other texts, can hardly tell whether a given one was there: "
                f"ε = {spent['epsilon']:.2f} at δ = {DELTA:g}, by dp-accounting's PLD accountant. "
                "The run is seeded so that it repeats; a real one draws its noise from the "
                "operating system's generator.",
                "The model is small (a two-layer Llama over bytes, trained from nothing), so that "
                "the tour stays short: what privacy costs in loss is real here, and smaller for a "
                "pretrained model.",
                f"The times are steps of SmolLM2-135M, all parameters, {ROWS} rows of {TOKENS} "
                "tokens: forward, backward and optimizer.",
            ),
            metrics=(
                Metric("Loss on held-out texts, nats per byte", private, "", ordinary,
                       "without privacy", digits=2),
                Metric("ε of each text", spent["epsilon"], "", digits=2),
                Metric("Time of a step of SmolLM2-135M", seconds["flashdp"], "s",
                       seconds["ordinary"], "without privacy", digits=2),
            ),
            tables=(_settings(steps, len(texts), spent),),
            plots=(_plot(curves),),
        )  # fmt: skip


def _small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tenfold.tasks import docstrings

    config = LlamaConfig(
        vocab_size=docstrings.VOCABULARY, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=docstrings.LENGTH,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _train(
    model: Any, texts: list[bytes], test: dict, steps: int, name: str, spent: dict, progress: Any
) -> list[tuple[int, float]]:
    import flashdp
    import torch

    from tenfold.tasks import docstrings

    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loader = flashdp.poisson_data_loader(
        texts, num_steps=steps, expected_batch_size=BATCH, public_n=len(texts),
        secure_rng=False, seed=SEED, collate_fn=docstrings.batch,
    )  # fmt: skip
    engine = flashdp.PrivacyEngine(secure_rng=False, seed=SEED)
    if name == "private":
        engine.make_private_with_epsilon(
            model, optimizer, loader, target_epsilon=EPSILON, target_delta=DELTA, steps=steps,
            max_grad_norm=CLIP, expected_batch_size=BATCH,
        )  # fmt: skip
    curve = [(0, _loss(model, test))]
    for step, batch in enumerate(loader, 1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0:
            curve.append((step, _loss(model, test)))
            progress(step / steps, f"{name}: step {step} of {steps}, loss {curve[-1][1]:.2f}")
    if name == "private":
        spent["epsilon"] = engine.get_epsilon(DELTA)
        spent["sigma"], spent["rate"] = engine.noise_multiplier, loader.sample_rate
        engine.detach()
    return curve


def _loss(model: Any, test: dict) -> float:
    """Mean over rows of each row's loss per byte."""
    import torch
    from flashdp.losses import unit_loss

    with torch.no_grad():
        logits = model(input_ids=test["input_ids"]).logits
    return float(unit_loss(logits, test["labels"])) / len(test["labels"])


def _time_smollm2(context: Context, *, quick: bool) -> dict[str, float]:
    """Time interleaved steps on one batch; medians."""
    import flashdp
    import torch
    from transformers import AutoModelForCausalLM

    from tenfold import assets

    folder, arms = assets.smollm2(), {}
    rows, tokens = (2, 16) if quick else (ROWS, TOKENS)
    ids = torch.randint(0, 49000, (rows, tokens), generator=torch.Generator().manual_seed(SEED))
    for name in ("ordinary", "flashdp"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        if name == "flashdp":
            flashdp.PrivacyEngine(secure_rng=False, seed=SEED).make_private(
                model, optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=rows
            )
        arms[name] = (model, optimizer, [])
    for _ in range(1 if quick else TIMED + 1):
        for model, optimizer, seconds in arms.values():
            began = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
    return {
        name: statistics.median(seconds[1:] or seconds) for name, (_, _, seconds) in arms.items()
    }


def _settings(steps: int, texts: int, spent: dict) -> Table:
    rows = {
        "texts": f"{texts:,}",
        "steps, expected batch": f"{steps}, {BATCH}",
        "clipping": f"C = {CLIP:g}, shared over modules",
        "noise multiplier": f"{spent['sigma']:.3f}",
        "optimizer": f"Adam, learning rate {LR:g}",
    }
    return Table("Settings", ("", ""), tuple(rows.items()))


def _plot(curves: dict[str, list[tuple[int, float]]]) -> Plot:
    from tenfold.plots import PALETTE, svg

    def draw(axes: Any) -> None:
        for colour, (name, curve) in zip(PALETTE, curves.items(), strict=False):
            axes.plot(*zip(*curve, strict=True), color=colour, marker="o", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per byte")
        axes.legend(fontsize="small")

    return Plot(
        "Loss on held-out texts",
        svg(draw, title="Loss on held-out docstrings by step, with and without privacy"),
        "The same model, batches and optimizer, with privacy and without.",
    )


STEP = FlashDPStep()
