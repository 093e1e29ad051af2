"""A step of a search, timed beside the ways in which other tools hold the prefix.

Every peer runs on the same candidates in the same process, at the batch that a trial found fastest
for it, and computes logits at the targets only, which the tools that it stands for do not all do.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import check_choice
from shared_kernels.bench import Arm, Workload
from torch import Tensor

from pskv.output import ScoreOutput
from pskv.passes import replicated
from pskv.scorer import PrefixScorer

if TYPE_CHECKING:
    from collections.abc import Sequence

PEERS = ("no cache", "replicate", "layerwise")
"""Passes over whole rows; a copy of the prefix per row in all layers, as search tools make it; a
copy per row in one layer at a time, the paper's way."""


class UncachedScorer(PrefixScorer):
    """Scores and differentiates by passes over whole rows: what every other way must agree with.

    It has what a search asks for: `score` with one target for all rows, and `token_gradient` of
    the likelihood.
    """

    @torch.no_grad()
    def score(
        self, prefix: Any, continuations: Any, *, targets: Any = None, reduction: str = "sum"
    ) -> ScoreOutput:
        """Score continuations int64 ``(N, S)``, 32 at a time."""
        end = torch.as_tensor(np.asarray(targets))
        rows = torch.as_tensor(np.asarray(continuations))
        ends = end.expand(len(rows), -1)
        whole = torch.cat([prefix.ids.expand(len(rows), -1), rows, ends], 1).to(self.device)
        parts = [
            self.model(part, use_cache=False, logits_to_keep=len(end) + 1).logits[:, :-1].cpu()
            for part in whole.split(32)
        ]
        logits = torch.cat(parts).float()
        found = logits.log_softmax(-1).gather(2, ends[..., None])[..., 0]
        greedy = logits.argmax(-1) == end
        return ScoreOutput(
            found.sum(1), list(found), list(logits.logsumexp(-1)), list(greedy), greedy.all(1),
            torch.full((len(rows),), len(end)), {"tokens": whole.numel()},
        )  # fmt: skip

    def token_gradient(
        self, prefix: Any, suffix_ids: Any, tail_ids: Any, target_ids: Any, *,
        objective: Any = "nll",
    ) -> Tensor:  # fmt: skip
        """Differentiate the likelihood of the targets."""
        check_choice("objective", objective, ("nll",))
        before, suffix, tail, target = (
            torch.as_tensor(np.asarray(part)).to(self.device)
            for part in (prefix.ids, suffix_ids, tail_ids, target_ids)
        )
        embed = self.model.get_input_embeddings()
        held, leaf, rest = (embed(x).detach() for x in (before, suffix, torch.cat([tail, target])))
        leaf.requires_grad_()
        logits = self.model(inputs_embeds=torch.cat([held, leaf, rest])[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits[-len(target) - 1 : -1].float(), target, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient @ embed.weight.detach().mT


class StepProblem:
    """Random candidates that differ from a parent in one token, and a target.

    Args:
        scorer: Of the model.
        prefix: Tokens of the prefix.
        rows: Candidates.
        suffix: Tokens that may differ.
        tail: Tokens between them and the target.
        target: Tokens to score.
        batches: Rows of a batch to try for each peer.
    """

    def __init__(
        self,
        scorer: PrefixScorer,
        *,
        prefix: int,
        rows: int,
        suffix: int,
        tail: int,
        target: int,
        batches: Sequence[int] = (512, 256, 128, 64, 32, 16),
    ) -> None:
        self.scorer, self.rows, self.suffix, self.tail = scorer, rows, suffix, tail
        self.batches = [batch for batch in batches if batch <= rows] or [rows]
        self._generator = np.random.default_rng(0)
        self.target = self._ids(target)
        self.prefix = scorer.prefill(self._ids(prefix))
        self.candidates = torch.empty(0)
        self.propose()

    def _ids(self, *shape: int) -> np.ndarray:
        return self._generator.integers(0, self.scorer.vocabulary_size, shape)

    def propose(self) -> None:
        """Make the candidates of another step."""
        candidates = np.tile(self._ids(self.suffix + self.tail), (self.rows, 1))
        places = self._generator.integers(0, self.suffix, self.rows)
        candidates[np.arange(self.rows), places] = self._ids(self.rows)
        self.candidates = torch.from_numpy(candidates)

    def ours(self) -> Tensor:
        """Score them by the scorer."""
        return self.scorer.score(self.prefix, self.candidates, targets=self.target).logprobs

    @torch.no_grad()
    def peer(self, name: str, batch: int) -> Tensor:
        """Score them by a peer's way, ``batch`` rows at a time."""
        device, count = self.scorer.device, len(self.target)
        target = torch.from_numpy(self.target)
        whole = torch.cat([self.candidates, target.expand(self.rows, -1)], 1).to(device)
        before = None if self.prefix.ids is None else self.prefix.ids.to(device)
        found = []
        for part in whole.split(batch):
            options: dict[str, Any] = {"use_cache": False}
            rows = part
            if name == "no cache":
                assert before is not None
                rows = torch.cat([before.expand(len(part), -1), part], 1)
            else:
                cache: Any = self.prefix.cache
                if name == "replicate":
                    cache = replicated(self.prefix.cache, len(part))
                options = {"past_key_values": cache, "use_cache": True}
            with self.prefix.cache.mode("expand"):
                logits = self.scorer.model(rows, logits_to_keep=count + 1, **options).logits[:, :-1]
            flat = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), part[:, -count:].flatten(), reduction="none"
            )
            found.append(-flat.view(len(part), count).sum(1))
            del logits, options
        return torch.cat(found).cpu()

    def best_batch(self, name: str, batches: Sequence[int] | None = None) -> int:
        """Return the fastest batch that fits.

        Raises:
            torch.OutOfMemoryError: None does.
        """
        seconds: dict[int, float] = {}
        on_gpu = self.scorer.device.type == "cuda"
        for batch in batches or self.batches:
            try:
                # a GPU's first call compiles and tunes; a CPU's one call is enough to compare
                for _ in range(2 if on_gpu else 1):
                    begin = time.perf_counter()
                    self.peer(name, batch)
                    seconds[batch] = time.perf_counter() - begin
            except torch.OutOfMemoryError:
                seconds.pop(batch, None)
            if on_gpu:
                torch.cuda.empty_cache()
        if not seconds:
            raise torch.OutOfMemoryError(f"{name}: no batch of {self.batches} fits")
        return min(seconds, key=lambda batch: seconds[batch])

    def check(self) -> None:
        """Compare the scores with those of the first peer's way."""
        ours, peer = self.ours(), self.peer("layerwise", self.batches[-1])
        worst = float((ours - peer).abs().max())
        scale = float(peer.abs().max())
        if worst > 0.01 * scale:
            raise AssertionError(f"scores differ by {worst:.2g} of {scale:.2g} nats")


def step_workload(
    problem: StepProblem, against: Sequence[str] = PEERS, *, name: str = "step",
    few: Sequence[int] = (),
) -> Workload:  # fmt: skip
    """Return the workload of `shared_kernels.bench` for one step.

    Args:
        problem: The step.
        against: Some of `PEERS`; the first but "no cache" is the baseline.
        name: Of the workload.
        few: Batches to try for "no cache", whose rows are long; by default those of the problem.
    """
    for peer in against:
        check_choice("against", peer, PEERS)
    batches = {
        peer: problem.best_batch(peer, few if peer == "no cache" and few else None)
        for peer in against
    }
    baseline = next((peer for peer in against if peer != "no cache"), "no cache")

    def arm(title: str, fn: Any) -> Arm:
        return Arm(name=title, fn=fn, setup=problem.propose)

    arms = [
        arm(peer, lambda peer=peer, batch=batch: problem.peer(peer, batch))
        for peer, batch in batches.items()
    ]
    return Workload(
        name=name, arms=[*arms, arm("pskv", problem.ours)], baseline=baseline,
        check=problem.check, device=problem.scorer.device.type, clock="wall",
        params={
            "prefix": problem.prefix.length, "rows": problem.rows, "suffix": problem.suffix,
            "tail": problem.tail, "target": len(problem.target),
            "dtype": str(next(problem.scorer.model.parameters()).dtype).removeprefix("torch."),
            "batches": batches, "backend": problem.scorer.backend,
            "tokens_per_pass": problem.scorer.tokens_per_pass,
        },
    )  # fmt: skip
