"""Gradient-free beam search from left to right, the family of BEAST."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pskv.search.config import BeamConfig
from pskv.search.evaluate import Evaluation, notice
from pskv.search.prompt import SearchPrompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from pskv.scorer import PrefixScorer
    from pskv.search.result import SearchResult, SearchStep


class BeamSearch:
    """Draws the next tokens from the model itself and keeps the beginnings that serve the target.

    After arXiv:2402.15570: k1 beginnings, k2 next tokens for each, drawn without replacement from
    what the model would write there; of the k1 k2 candidates the k1 with the smallest negative
    log-likelihood of the target go on. What is found reads like text.

    Args:
        scorer: With a tokenizer.
        config: Settings.
    """

    def __init__(self, scorer: PrefixScorer, config: BeamConfig | None = None) -> None:
        self.scorer, self.config = scorer, config or BeamConfig()

    def run(
        self,
        messages: str | list[dict[str, str]],
        target: str,
        *,
        on_step: Callable[[SearchStep], None] | None = None,
        progress: bool = True,
    ) -> SearchResult:
        """Search.

        Args:
            messages: As `CoordinateSearch.run`.
            target: What the model should say, a benign sentence.
            on_step: Called after every token.
            progress: Show a bar.

        Raises:
            ValueError: A prompt that cannot be rendered, or what `PrefixScorer.score` refuses.
        """
        notice()
        config = self.config
        tokenizer = self.scorer.tokenizer
        prompt = SearchPrompt.render(tokenizer, messages, target)
        evaluation = Evaluation(self.scorer, prompt, max_perplexity=config.max_perplexity)
        generator = torch.Generator().manual_seed(config.seed)
        special = torch.tensor(tokenizer.all_special_ids)
        beams = torch.zeros(1, 0, dtype=torch.int64)
        best: tuple[float, list[int]] = (float("inf"), [])
        steps: list[SearchStep] = []
        bar = tqdm(range(config.length), disable=not progress, desc="search", leave=False)
        for place in bar:
            draws = config.expansions if place else config.beams * config.expansions
            candidates = self._expand(evaluation, beams, draws, special, generator)
            before = evaluation.dropped
            if config.filter:
                kept = candidates[evaluation.survives(candidates)]
                # a character may take several tokens, so a beginning may fail and its end not
                candidates = kept if len(kept) else candidates
            found = evaluation.losses(candidates)
            order = found.loss.argsort(stable=True)[: config.beams]
            beams = candidates[order]
            first = (float(found.loss[order[0]]), beams[0].tolist())
            best = min(best, first, key=lambda item: item[0])
            steps.append(evaluation.step(first[1], first[0], best[0], evaluation.dropped - before))
            bar.set_postfix(loss=f"{best[0]:.3f}")
            if on_step is not None:
                on_step(steps[-1])
            if config.early_stop and evaluation.elicited is not None:
                break
        ids, loss = best[1], best[0]
        return evaluation.result(ids, loss, steps, {"search": "beam", **asdict(config)})

    def _expand(
        self,
        evaluation: Evaluation,
        beams: Tensor,
        draws: int,
        special: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the beams, each with ``draws`` next tokens, ``(beams * draws, s + 1)``."""
        rows = list(beams.numpy())
        if not evaluation.prefix.length and not beams.shape[1]:
            raise ValueError("messages: expected a token before the place, as the first is drawn")
        logits = self.scorer.next_token_logits(evaluation.prefix, rows).double().cpu()
        evaluation.count_draws(beams.numel(), len(rows))
        logits[:, special[special < logits.shape[1]]] = -torch.inf
        chances = (logits / self.config.temperature).softmax(-1)
        count = min(draws, int((chances > 0).sum(1).min()))
        tokens = torch.multinomial(chances, count, generator=generator)
        grown = beams.repeat_interleave(count, 0)
        return torch.cat([grown, tokens.reshape(-1, 1)], 1)
