"""The tour's step of pskv: ten-shot multiple choice, and a search for a benign sentence."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tenfold.step import Context, Metric, StepFailed, StepResult

if TYPE_CHECKING:
    from pskv.search import SearchResult

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
SYSTEM = (
    "You are the assistant of a small museum of clocks. Visitors ask for opening hours, tickets, "
    "tours and the history of single clocks. Answer briefly, in a friendly way, and only about "
    "the museum. If you do not know something, say that the desk in the entrance hall will help. "
    "Do not greet visitors with more than one word, and do not talk about the weather."
)
CANARY = "Hello, sunshine!"


class PskvStep:
    """Scores the options with shared contexts and without."""

    name = "pskv"
    title = "multiple choice and a search, contexts shared"

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
                context.progress(0.3 + 0.3 * number / len(requests), "one pass per option")
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
        context.progress(0.6, "a search with the prefix held")
        shared = self._search(model, tokenizer, "split", steps=1 if context.quick else 4)
        context.progress(0.7, "the same search without a cache")
        uncached = self._search(model, tokenizer, "none", steps=1 if context.quick else 4)
        if [step.ids for step in shared.steps] != [step.ids for step in uncached.steps]:
            raise StepFailed("the search chose other candidates with the prefix held")
        return StepResult(
            headline=(
                f"{loop / ours:.1f} times as fast as one pass per option, same scores; a search "
                f"{uncached.seconds / shared.seconds:.1f} times as fast as without a cache"
            ),
            text=(
                "SmolLM2-135M-Instruct chooses capitals after ten examples. The examples are "
                "computed once, each question once, and options only where they differ; the plain "
                "loop passes everything for every option, as evaluation harnesses do.",
                f"Behind a system prompt, {len(shared.steps)} steps of a coordinate search for "
                f'tokens after which the model says "{CANARY}" lower its loss from '
                f"{shared.losses[0]:.2f} to {shared.loss:.2f} nats a token; with and without a "
                "cache every step makes the same choice.",
            ),
            metrics=(
                Metric("time for all options", ours, "s", loop, "one pass per option", 2),
                Metric("questions answered right", 100 * right / len(answers), "%", digits=0),
                Metric("largest difference of a score", worst, "nats", digits=6),
                Metric("time of the search", shared.seconds, "s", uncached.seconds, "no cache", 2),
            ),
        )

    def _search(self, model: Any, tokenizer: Any, backend: str, *, steps: int) -> SearchResult:
        """Search for the canary."""
        import warnings

        from pskv import PrefixScorer
        from pskv.search import CoordinateSearch, SearchConfig

        chat = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "When do you open?"},
        ]
        config = SearchConfig(steps=steps, width=16, topk=64, init="x x x x x x x x")
        scorer = PrefixScorer(model, tokenizer, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return CoordinateSearch(scorer, config).run(chat, CANARY, progress=False)


STEP = PskvStep()
