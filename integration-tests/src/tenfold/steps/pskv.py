"""The tour's step of pskv: ten-shot multiple choice, against one forward pass per option."""

from __future__ import annotations

import time
from typing import Any

from tenfold.step import Context, Metric, StepFailed, StepResult

SHOTS = {
    "France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo",
    "Egypt": "Cairo", "Cuba": "Havana", "Iraq": "Baghdad", "Austria": "Vienna", "Ghana": "Accra",
}  # fmt: skip
QUESTIONS = {
    "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Poland": "Warsaw",
    "Greece": "Athens", "Ireland": "Dublin", "Russia": "Moscow", "Finland": "Helsinki",
}  # fmt: skip
BOUND = 1e-2
"""Nats by which the two ways may differ on an option."""


class PskvStep:
    """Scores the options with shared contexts and without."""

    name = "pskv"
    title = "ten-shot multiple choice, contexts shared"

    def run(self, context: Context) -> StepResult:
        """Score every option both ways, and compare."""
        import torch
        from pskv import PrefixScorer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tenfold.assets import smollm2

        context.progress(0.0, "loading SmolLM2")
        tokenizer: Any = AutoTokenizer.from_pretrained(smollm2())
        model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
        questions = dict(list(QUESTIONS.items())[: 2 if context.quick else len(QUESTIONS)])
        shots = "".join(f"The capital of {a} is {b}.\n" for a, b in SHOTS.items())
        cities = list(QUESTIONS.values())
        requests, answers = [], []
        for number, country in enumerate(questions):
            ids = tokenizer(f"{shots}The capital of {country} is")["input_ids"]
            options = [cities[(number + shift) % len(cities)] for shift in range(4)]
            encoded = tokenizer([f" {city}" for city in options], add_special_tokens=False)
            requests += [(ids, option) for option in encoded["input_ids"]]
            answers.append(0)
        scorer = PrefixScorer(model, backend="split")
        context.progress(0.2, "contexts shared")
        begin = time.perf_counter()
        found = [value for value, _ in scorer.score_requests(requests)]
        ours = time.perf_counter() - begin
        plain, begin = [], time.perf_counter()
        with torch.no_grad():
            for number, (ids, option) in enumerate(requests):
                context.progress(0.4 + 0.6 * number / len(requests), "one pass per option")
                row = torch.tensor([ids + option])
                logprobs = model(row, use_cache=False).logits[0].log_softmax(-1)
                places = torch.arange(len(ids), row.shape[1])
                plain.append(float(logprobs[places - 1, row[0, places]].sum()))
        loop = time.perf_counter() - begin
        worst = max(abs(a - b) for a, b in zip(found, plain, strict=True))
        if worst > BOUND:
            raise StepFailed(f"shared and separate scores differ by {worst:.1e} nats")
        right = sum(
            max(range(4), key=lambda option, q=q: found[4 * q + option]) == answer
            for q, answer in enumerate(answers)
        )
        return StepResult(
            headline=f"{loop / ours:.1f} times as fast as one pass per option, same scores",
            text=(
                "SmolLM2-135M-Instruct chooses capitals after ten examples. The examples are "
                "computed once, each question once, and options only where they differ; the plain "
                "loop passes everything for every option, as evaluation harnesses do.",
            ),
            metrics=(
                Metric("time for all options", ours, "s", loop, "one pass per option", 2),
                Metric("questions answered right", 100 * right / len(answers), "%", digits=0),
                Metric("largest difference of a score", worst, "nats", digits=6),
            ),
        )


STEP = PskvStep()
