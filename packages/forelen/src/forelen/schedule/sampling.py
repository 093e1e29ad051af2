"""Lengths for a sampler that decodes many answers to each prompt and chooses who runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.ops.pool import PoolState, plp_step
from shared_kernels.ops.sampling import gumbel_sample

from forelen.fingerprint import check_model, sampling_of
from forelen.reading import ModelReader, UnsupportedModelError
from forelen.streaming import DECAY

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from forelen.distribution import LengthDistribution
    from forelen.modeling_forelen import LengthPredictor


class Prompt(Protocol):
    """What a sampler tells of a prompt: tokens, states ``(P, d)`` and ``(d,)``, and samples."""

    ids: Sequence[int]
    hidden: Tensor
    samples: Sequence[int]
    states: Tensor | None


class SampledLengths:
    """A predictor as samplers ask one: before answers begin, and again while they grow.

    It has the methods of the protocol ``ProgressivePredictor`` of infsampling; any sampler may call
    them. What it remembers of an answer is kept by the answer's number, so that answers can leave
    the batch and come back, and all work of a step is on the device, without waiting for it: a step
    can be recorded as a CUDA graph.

    Args:
        predictor: Trained for the model. With ``plp`` in its config an answer's own states are
            read; otherwise it tells how long an answer of this age is yet, by its prompt.
        model: The model that answers.
        level: The quantile that is told, not calibrated; None tells the mean. A schedule that
            ends with its last answer wants what an answer may need at worst: what was thought short
            and turns out long keeps all waiting.
        probe_tokens: Tokens that all answers should have before they are put in order.

    Attributes:
        wants_states: Whether prompts must come with the states of all their tokens.

    Raises:
        FingerprintError: Not the model the predictor was trained for.
        UnsupportedModelError: The predictor reads a layer other than the last, whose states
            samplers have not at hand; or a model whose states cannot be read.
        ValueError: A level outside (0, 1), or a negative number of tokens.
    """

    def __init__(
        self,
        predictor: LengthPredictor,
        model: Any,
        *,
        level: float | None = 0.999,
        probe_tokens: int = 16,
    ) -> None:
        check_model(predictor.config.fingerprint, model)
        if level is not None and not 0 < level < 1:
            raise ValueError(message("level", "a number in (0, 1)", level, "or None for the mean"))
        check_range("probe_tokens", probe_tokens, 0, 1 << 31, "0 for no probe")
        self.spec = predictor.config.feature_spec()
        if self.spec.layer != -1:
            raise UnsupportedModelError(
                f"predictor: expected one that reads the last layer (-1), got layer "
                f"{self.spec.layer}; a sampler has only the states that the head reads: train with "
                "layer=-1"
            )
        self.predictor, self.level, self.probe_tokens = predictor, level, probe_tokens
        self.reader = ModelReader(model)
        self.wants_states = self.spec.pooling != "last"
        trained = predictor.config.sampling or sampling_of(model)
        self.eos = list(trained.get("eos_token_id") or [])
        self._shape: tuple[Any, ...] | None = None

    # --- prompts -----------------------------------------------------------------------------

    @torch.no_grad()
    def initial(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Return the expected tokens of each prompt's answers, float64 ``(n,)`` a prompt.

        Raises:
            ValueError: A prompt came without the states of its tokens.
        """
        found = torch.cat([self._feature(prompt) for prompt in prompts])
        self._bad = ~found.isfinite().all(-1)
        self._folded = self.predictor.folded(found.device)
        self._prompt = self._folded.prompt(torch.where(self._bad[:, None], 0.0, found))
        self._first = self._folded.output(self._prompt)
        law = self.predictor.distribution_of(self._first, bad=self._bad, calibrated=False)
        told = self._told(law).cpu()
        return [told[row].expand(len(prompt.samples)).numpy() for row, prompt in enumerate(prompts)]

    def _feature(self, prompt: Prompt) -> Tensor:
        if not self.wants_states:
            return prompt.hidden[None].float()
        if prompt.states is None or len(prompt.states) != len(prompt.ids):
            remedy = "the sampler must keep them where `wants_states` is true"
            expected = f"the states of {len(prompt.ids)} tokens"
            raise ValueError(message("states", expected, prompt.states, remedy))
        states = prompt.states[None]
        ids = torch.tensor([list(prompt.ids)], device=states.device)
        attention = torch.ones_like(ids)
        content = self.predictor.config.chat_span().mask(ids, attention)
        return self.reader.features({-1: states}, [self.spec], attention, content)[self.spec.key]

    def _told(self, law: LengthDistribution) -> Tensor:
        return law.mean() if self.level is None else law.quantile(self.level)

    # --- answers -----------------------------------------------------------------------------

    def begin(self, owners: Sequence[int], hidden: Tensor) -> None:
        """Forget all answers; buffers are kept if those to come are as many.

        Args:
            owners: Of each of R answers its prompt, a place in what `initial` was given.
            hidden: float ``(lanes, d)``, like those of `update`.
        """
        rows, width, device = len(owners) + 1, hidden.shape[1], hidden.device
        if self._shape != (rows, width, device):
            self._shape = (rows, width, device)
            self._state = PoolState.empty(rows, width, device=device)
            self._features = torch.zeros(rows, 2 * width + 4, device=device)
            self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
            self._ends = torch.tensor(self.eos, dtype=torch.int64, device=device)
        self._state.peak.fill_(float("-inf"))
        for buffer in (*self._state[1:], self._features, self._counts):
            buffer.zero_()
        self._owners = torch.tensor(list(owners), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, rows: Tensor, hidden: Tensor, logits: Tensor) -> None:
        """Read a token more of some answers.

        Args:
            rows: int64 ``(lanes,)``, numbers of the answers; R for a lane without one.
            hidden: float ``(lanes, d)``, final states of the tokens.
            logits: float ``(lanes, V)``, of the next tokens, as the head gives them.
        """
        counts = self._counts[rows] + 1
        if self.predictor.config.plp:
            # the likeliest token's log-probability tells the normaliser: one pass over the logits
            keys, index = rows.new_zeros(len(rows), 2), torch.zeros_like(rows)
            token, logprob, _, entropy = gumbel_sample(logits, keys, index, temperature=0.0)
            entropy = entropy.float()
            log_eos = torch.full_like(entropy, -30.0)
            if self.eos:
                top = logits.gather(1, token.clamp(min=0)[:, None])[:, 0].float()
                ends = logits[:, self._ends].float().logsumexp(-1)
                # an end token that cannot come has no logarithm
                log_eos = (ends - top + logprob.float()).clamp(min=-30.0)
            features = self._features[rows]
            average = torch.lerp(entropy, features[:, -2], DECAY)
            average = torch.where(counts == 1, entropy, average)
            numbers = torch.stack([counts.float().log1p(), entropy, average, log_eos], -1)
            state = PoolState(*(kept[rows] for kept in self._state))
            plp_step(state, hidden, entropy, numbers, torch.ones_like(rows) > 0, features)
            for kept, new in zip(self._state, state, strict=True):
                kept.index_copy_(0, rows, new)
            self._features.index_copy_(0, rows, features)
        self._counts.index_copy_(0, rows, counts)

    def law(self) -> LengthDistribution:
        """Return the distribution of the tokens to come of each answer, after those read."""
        folded, owners, counts = self._folded, self._owners, self._counts[:-1]
        first, features = self._first[owners], self._features[:-1]
        bins = self.predictor.bins
        left = bins.remaining(first, counts)
        if folded.step is not None and folded.step_bias is not None:
            second = folded._replace(head=folded.step)
            left = left * second.output(folded.step_bias + features @ folded.step.weight.T)
            left = left / left.sum(-1, keepdim=True)
        elif self.predictor.config.plp:
            left = folded.output(self._prompt[owners] + features @ folded.head.weight.T)
        left = torch.where(counts[:, None] > 0, left, first)
        return self.predictor.distribution_of(left, bad=self._bad[owners], calibrated=False)

    @torch.no_grad()
    def remaining(self) -> np.ndarray:
        """Return how many tokens of each answer are expected beyond those read, float64 ``(R,)``.

        This waits for the device.
        """
        return self._told(self.law()).cpu().numpy()

    def finished(self, ids: Sequence[int], lengths: np.ndarray) -> None:
        """Learn nothing: the predictor was trained before."""
