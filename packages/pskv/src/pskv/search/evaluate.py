"""What both searches share: the prompt, the filters, the losses, and the book-keeping."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared_kernels.files import write_text
from torch import Tensor

from pskv.search.result import SearchResult, SearchStep
from pskv.support import inner_model
from pskv.tokenization import RoundTripFilter

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from pskv.output import ScoreOutput
    from pskv.scorer import PrefixScorer
    from pskv.search.prompt import SearchPrompt

_noticed = False


def notice() -> None:
    """Say once what searches are for."""
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(
            "pskv.search is for measuring models you own or may test, with benign targets",
            UserWarning,
            stacklevel=3,
        )


class Losses(NamedTuple):
    """Of candidates, on the CPU.

    Attributes:
        loss: float64 ``(N,)``; infinite where a perplexity filter drops the candidate.
        nll: float64 ``(N,)``, of the target, summed.
        greedy: bool ``(N,)``, whether greedy decoding gives the target.
    """

    loss: Tensor
    nll: Tensor
    greedy: Tensor


class Evaluation:
    """Evaluates candidates for one prompt and counts what it costs.

    Args:
        scorer: With a tokenizer.
        prompt: What stands around a candidate.
        objective: nll or mellowmax.
        alpha: Of mellowmax.
        max_perplexity: Candidates above it are dropped.
    """

    def __init__(
        self,
        scorer: PrefixScorer,
        prompt: SearchPrompt,
        *,
        objective: str = "nll",
        alpha: float = 1.0,
        max_perplexity: float | None = None,
    ) -> None:
        self.scorer, self.prompt = scorer, prompt
        self.objective, self.alpha, self.max_perplexity = objective, alpha, max_perplexity
        self.prefix = scorer.prefill(prompt.before)
        self._filter: RoundTripFilter | None = None
        self.evaluations = self.dropped = 0
        self.tokens, self.flops = len(prompt.before), 0.0
        self.best_nll = math.inf
        self.elicited: tuple[int, list[int]] | None = None
        self._begin = time.perf_counter()
        model = inner_model(scorer.model)
        self._per_token = 2.0 * model.num_parameters(exclude_embeddings=True)
        self._per_target = 2.0 * model.get_output_embeddings().weight.numel()
        self.flops += self._per_token * self.tokens

    def survives(self, candidates: Tensor) -> Tensor:
        """Return which candidates stay the same when the whole prompt is written and read."""
        if self._filter is None:
            self._filter = RoundTripFilter(
                self.scorer.tokenizer,
                self.prompt.before.tolist(),
                self.prompt.after.tolist(),
            )
        kept = self._filter(candidates)
        self.dropped += int((~kept).sum())
        return kept

    def losses(self, candidates: Tensor) -> Losses:
        """Evaluate candidates int64 ``(N, s)`` on the CPU."""
        count, length = candidates.shape
        after, target = torch.from_numpy(self.prompt.after), torch.from_numpy(self.prompt.target)
        rows = torch.cat([candidates, after.expand(count, -1)], 1)
        goal = len(self.prompt.target)
        likely = torch.ones(count, dtype=torch.bool)
        if self.max_perplexity is None:
            output = self.scorer.score(self.prefix, rows, targets=self.prompt.target)
            goals = [torch.stack(part) for part in _parts(output)]
        else:
            if not self.prefix.length:
                raise ValueError("max_perplexity: needs a token in front of the candidates")
            output = self.scorer.score(self.prefix, torch.cat([rows, target.expand(count, -1)], 1))
            whole = [torch.stack(part) for part in _parts(output)]
            likely = -whole[0][:, :length].double().mean(1) <= math.log(self.max_perplexity)
            goals = [part[:, -goal:] for part in whole]
        logprobs, lse = goals[0].double(), goals[1].double()
        greedy = goals[2].all(1) & likely
        self._count(output, count, goal)
        nll = -logprobs.sum(1)
        if self.objective == "mellowmax":
            logits = logprobs + lse
            loss = (torch.logsumexp(-self.alpha * logits, 1) - math.log(goal)) / self.alpha
        else:
            loss = nll / goal
        loss = loss.masked_fill(~likely, math.inf)
        self.dropped += int((~likely).sum())
        self._note(candidates, nll, loss, greedy)
        return Losses(loss, nll, greedy)

    def _count(self, output: ScoreOutput, count: int, goal: int) -> None:
        self.tokens += output.stats["tokens"]
        self.flops += self._per_token * output.stats["tokens"] + self._per_target * count * goal

    def count_gradient(self, length: int) -> None:
        """Take note of a forward and a backward pass that stops at the activations."""
        self.tokens += length
        self.flops += 2 * self._per_token * length
        self.flops += 2 * self._per_target * len(self.prompt.target)

    def count_draws(self, tokens: int, rows: int) -> None:
        """Take note of a pass that asks what follows so many rows."""
        self.tokens += tokens
        self.flops += self._per_token * tokens + self._per_target * rows

    def _note(self, candidates: Tensor, nll: Tensor, loss: Tensor, greedy: Tensor) -> None:
        found = greedy.nonzero()[:, 0]
        if self.elicited is None and len(found):
            first = int(found[0])
            self.elicited = (self.evaluations + first + 1, candidates[first].tolist())
        allowed = nll[loss.isfinite()]
        self.best_nll = min(self.best_nll, float(allowed.min())) if len(allowed) else self.best_nll
        self.evaluations += len(candidates)

    def step(self, ids: list[int], loss: float, best: float, dropped: int) -> SearchStep:
        """Describe a step."""
        seconds = time.perf_counter() - self._begin
        return SearchStep(ids, loss, best, self.best_nll, self.evaluations, dropped, seconds)

    def result(
        self, ids: list[int], loss: float, steps: list[SearchStep], config: dict[str, Any]
    ) -> SearchResult:
        """Describe the search, and let the prefix go."""
        text = self.scorer.tokenizer.decode(ids)
        assert isinstance(text, str)
        found = SearchResult(
            ids, text, loss, evaluations=self.evaluations, dropped=self.dropped,
            tokens=self.tokens, flops=self.flops, seconds=time.perf_counter() - self._begin,
            steps=steps, config=config,
        )  # fmt: skip
        if self.elicited is not None:
            found.elicited_at, found.elicited_ids = self.elicited
        self.prefix.close()
        return found

    # -- resuming --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        return {
            "evaluations": self.evaluations, "dropped": self.dropped, "tokens": self.tokens,
            "flops": self.flops, "best_nll": self.best_nll, "elicited": self.elicited,
            "seconds": time.perf_counter() - self._begin,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        for name in ("evaluations", "dropped", "tokens", "flops", "best_nll"):
            setattr(self, name, state[name])
        found = state["elicited"]
        self.elicited = None if found is None else (found[0], list(found[1]))
        self._begin = time.perf_counter() - state["seconds"]


def _parts(output: ScoreOutput) -> tuple[list[Tensor], ...]:
    return output.token_logprobs, output.token_lse, output.token_is_greedy


def problem_hash(prompt: SearchPrompt, config: dict[str, Any]) -> str:
    """Return what a checkpoint must agree with: prompt, target and settings but the steps."""
    parts: list[Any] = [part.tolist() for part in (prompt.before, prompt.after, prompt.target)]
    parts.append({name: value for name, value in config.items() if name != "steps"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_checkpoint(path: Path | None, problem: str) -> dict[str, Any] | None:
    """Read a checkpoint, if there is one.

    Raises:
        ValueError: It is of another search.
    """
    if path is None or not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("problem") != problem:
        raise ValueError(
            f"checkpoint: {path} is of another prompt, target or setting; name another file, or "
            "delete it"
        )
    return state


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole."""
    write_text(path, json.dumps(state))


def pack_random_state(generator: torch.Generator) -> str:
    """Return a generator's state as text."""
    return generator.get_state().numpy().tobytes().hex()


def unpack_random_state(generator: torch.Generator, text: str) -> None:
    """Set a generator's state."""
    generator.set_state(torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8))


def to_tensor(ids: np.ndarray) -> Tensor:
    """Return ids as a row of candidates ``(1, s)``."""
    return torch.from_numpy(ids)[None]
