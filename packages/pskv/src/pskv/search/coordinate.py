"""Greedy coordinate search over tokens, the family of greedy coordinate gradient."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pskv.search.config import SearchConfig
from pskv.search.evaluate import (
    Evaluation,
    load_checkpoint,
    notice,
    pack_random_state,
    problem_hash,
    save_checkpoint,
    to_tensor,
    unpack_random_state,
)
from pskv.search.prompt import SearchPrompt
from pskv.search.result import SearchResult, SearchStep
from pskv.search.samplers import MomentumSampler, Sampler, allowed_tokens, make_sampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from pskv.scorer import PrefixScorer

_SAVE_EVERY = 10


class CoordinateSearch:
    """Changes one token at a time so that a model says a target (arXiv:2307.15043).

    A step takes the gradient of the loss with respect to the choice of each token, draws candidates
    that differ from their parent in the places and tokens that a sampler picks, evaluates them all,
    and goes on from the best. The result depends on the seed and not on the device or the backend,
    as far as rounding allows: ties go to the first candidate.

    Args:
        scorer: With a tokenizer.
        config: Settings.
        sampler: Another way to draw candidates, for one run; by default the settings' one.
    """

    def __init__(
        self,
        scorer: PrefixScorer,
        config: SearchConfig | None = None,
        *,
        sampler: Sampler | None = None,
    ) -> None:
        self.scorer, self.config = scorer, config or SearchConfig()
        self._sampler = sampler
        self._allowed: Tensor | None = None

    def run(
        self,
        messages: str | list[dict[str, str]],
        target: str,
        *,
        checkpoint: str | Path | None = None,
        on_step: Callable[[SearchStep], None] | None = None,
        progress: bool = True,
    ) -> SearchResult:
        """Search.

        Args:
            messages: A user's message or a chat; ``{optim_str}`` marks the place of the tokens, the
                end of the last message by default.
            target: What the model should say, a benign sentence.
            checkpoint: A JSON file that is written every tenth step, and gone on from if it is
                there.
            on_step: Called after every step.
            progress: Show a bar.

        Raises:
            ValueError: A prompt that cannot be rendered or does not survive being read again, a
                checkpoint of another search, or what `PrefixScorer.score` refuses.
        """
        notice()
        config = self.config
        tokenizer = self.scorer.tokenizer
        prompt = SearchPrompt.render(tokenizer, messages, target)
        settings = asdict(config)
        path = None if checkpoint is None else Path(checkpoint)
        saved = load_checkpoint(path, problem_hash(prompt, settings))
        init = prompt.encode(tokenizer, config.init, joined=config.filter)
        sampler = self._sampler or make_sampler(config)
        generator = torch.Generator().manual_seed(config.seed)
        evaluation = Evaluation(
            self.scorer, prompt, objective=config.objective, alpha=config.mellowmax_alpha,
            max_perplexity=config.max_perplexity,
        )  # fmt: skip
        steps: list[SearchStep] = []
        if saved is None:
            first = evaluation.losses(to_tensor(init))
            buffer = [(float(first.loss[0]), init.tolist())]
            best = buffer[0]
        else:
            evaluation.restore(saved["counts"])
            unpack_random_state(generator, saved["random"])
            steps = [SearchStep(**step) for step in saved["steps"]]
            buffer = [(loss, ids) for loss, ids in saved["buffer"]]
            best = (saved["best"][0], saved["best"][1])
            if saved["momentum"] is not None and isinstance(sampler, MomentumSampler):
                sampler.average = torch.tensor(saved["momentum"])
        bar = tqdm(
            total=config.steps, initial=len(steps), disable=not progress, desc="search", leave=False
        )
        with bar:
            while len(steps) < config.steps and not self._stops(evaluation):
                parent = torch.tensor(buffer[0][1])
                loss, ids, dropped = self._step(evaluation, sampler, parent, generator)
                if ids is not None:
                    best = min(best, (loss, ids), key=lambda item: item[0])
                    self._keep(buffer, loss, ids)
                steps.append(evaluation.step(ids or parent.tolist(), loss, best[0], dropped))
                bar.update()
                bar.set_postfix(loss=f"{best[0]:.3f}")
                if on_step is not None:
                    on_step(steps[-1])
                if path is not None and len(steps) % _SAVE_EVERY == 0:
                    average = getattr(sampler, "average", None)
                    save_checkpoint(path, {
                        "problem": problem_hash(prompt, settings), "counts": evaluation.state(),
                        "random": pack_random_state(generator), "buffer": buffer, "best": best,
                        "momentum": None if average is None else average.tolist(),
                        "steps": [asdict(step) for step in steps],
                    })  # fmt: skip
        return evaluation.result(best[1], best[0], steps, {"search": "coordinate", **settings})

    def _stops(self, evaluation: Evaluation) -> bool:
        return self.config.early_stop and evaluation.elicited is not None

    def _step(
        self, evaluation: Evaluation, sampler: Sampler, parent: Tensor, generator: torch.Generator
    ) -> tuple[float, list[int] | None, int]:
        """Return the best candidate's loss and ids, and how many were dropped."""
        config, prompt = self.config, evaluation.prompt
        gradient = None
        if sampler.needs_gradient:
            gradient = self.scorer.token_gradient(
                evaluation.prefix, parent, prompt.after, prompt.target,
                objective=self._objective(),
            )  # fmt: skip
            evaluation.count_gradient(len(parent) + len(prompt.after) + len(prompt.target) - 1)
        before = evaluation.dropped
        candidates = sampler.propose(
            parent, gradient, self._allowed_tokens(), config.width, generator
        )
        if config.filter:
            candidates = candidates[evaluation.survives(candidates)]
        if not len(candidates):
            return float("inf"), None, evaluation.dropped - before
        found = evaluation.losses(candidates)
        best = int(found.loss.argmin())
        ids = candidates[best].tolist() if found.loss[best].isfinite() else None
        return float(found.loss[best]), ids, evaluation.dropped - before

    def _keep(self, buffer: list[tuple[float, list[int]]], loss: float, ids: list[int]) -> None:
        """Put a candidate into the buffer, sorted, the worst leaving it."""
        size = self.config.buffer_size
        if size == 0:
            buffer[:] = [(loss, ids)]
            return
        if len(buffer) < size:
            buffer.append((loss, ids))
        elif loss < buffer[-1][0]:
            buffer[-1] = (loss, ids)
        buffer.sort(key=lambda item: item[0])

    def _objective(self) -> Any:
        if self.config.objective == "nll":
            return "nll"
        alpha = self.config.mellowmax_alpha

        def mellowmax(logits: Tensor, targets: Tensor) -> Tensor:
            chosen = logits.float().gather(1, targets[:, None])[:, 0]
            return torch.logsumexp(-alpha * chosen, 0) / alpha

        return mellowmax

    def _allowed_tokens(self) -> Tensor:
        if self._allowed is None:
            self._allowed = allowed_tokens(
                self.scorer.tokenizer, self.scorer.vocabulary_size,
                non_ascii=self.config.allow_non_ascii,
            )  # fmt: skip
        return self._allowed
