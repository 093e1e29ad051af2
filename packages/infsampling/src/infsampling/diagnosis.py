"""Can this model be sampled here, is it right, and does the schedule change nothing?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from infsampling.config import SamplingConfig
from infsampling.errors import UnsupportedModelError
from infsampling.length_prediction import OracleLengths
from infsampling.sampler import InfiniteSampler

_PROMPTS, _SAMPLES, _TOKENS, _SLOTS = ((17, 40), 12, 24, 8)
#: Nats by which a log-probability may differ from that of one pass over the whole sequence.
_BOUND = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        model: Its class.
        dtype: Of its weights.
        device: Of its embeddings.
        refused: Why it cannot be sampled, or None.
        error: Mean difference of a log-probability from that of one pass over prompt and
            completion, in nats.
        bound: What it may be.
        same_tokens: Whether four policies gave the same tokens.
        same_bits: Whether they gave the same log-probabilities, bit for bit.
        graph: Whether a step was recorded as a CUDA graph.
        step_seconds: Of a step of 8 slots.
    """

    model: str
    dtype: str
    device: str
    refused: str | None = None
    error: float | None = None
    bound: float | None = None
    same_tokens: bool | None = None
    same_bits: bool | None = None
    graph: bool | None = None
    step_seconds: float | None = None

    @property
    def works(self) -> bool:
        """Whether samples are right and depend on no schedule."""
        return self.refused is None and bool(self.same_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self) | {"works": self.works}


def diagnose(model: Any, *, seed: int = 0) -> Diagnosis:
    """Sample random prompts under four policies, and compare.

    Args:
        model: A causal language model of transformers.
        seed: Of prompts and samples.
    """
    weight = next(model.parameters())
    about = (type(model).__name__, str(weight.dtype).removeprefix("torch."), str(weight.device))
    config = SamplingConfig(
        max_slots=_SLOTS, max_new_tokens=_TOKENS, eos_token_id=(), seed=seed, turn=4, sync_every=4,
        rerank_every=4, compile=False,
    )  # fmt: skip
    random = np.random.default_rng(seed)
    try:
        sampler = InfiniteSampler(model, config)
    except UnsupportedModelError as error:
        return Diagnosis(*about, refused=str(error))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [random.integers(0, vocabulary, length).tolist() for length in _PROMPTS]
    lengths = random.integers(1, _TOKENS + 1, (len(prompts), _SAMPLES)).tolist()
    forced = [length for group in lengths for length in group]
    found = []
    for policy in ("fifo", "lpt", "sjf", "turns"):
        sampler = InfiniteSampler(
            model, config.replace(policy=policy), length_predictor=OracleLengths(lengths)
        )
        found.append(sampler.generate(prompts, _SAMPLES, forced_lengths=forced))
    first = found[0]
    errors = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for number, ids in enumerate(prompts):
            for row in [r for r, p in enumerate(first.prompt_index) if p == number][:4]:
                tokens = first.completion_ids[row]
                whole = torch.tensor([[*ids, *tokens]], device=weight.device)
                logits = model(whole, use_cache=False).logits[0, len(ids) - 1 : -1].float()
                law = logits.log_softmax(-1).cpu()[range(len(tokens)), tokens]
                errors.append((torch.tensor(first.logprobs[row]) - law).abs())
    model.train(training)
    error, bound = float(torch.cat(errors).mean()), _BOUND.get(weight.dtype, 0.05)
    refused = None
    if not error <= bound:
        refused = (
            f"model: its log-probabilities differ by {error:.1e} nats from those of one pass over "
            f"the whole sequence (allowed: {bound:.0e}); use its own `generate`, and please report "
            "the model"
        )
    return Diagnosis(
        *about, refused, error, bound,
        all(other.completion_ids == first.completion_ids for other in found),
        all(other.logprobs == first.logprobs for other in found),
        any(other.stats.graph_captures for other in found),
        found[-1].stats.decode_seconds / max(1, found[-1].stats.decode_steps),
    )  # fmt: skip
