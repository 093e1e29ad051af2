"""Can this model share a prefix, is it right, and which way is the fastest here?"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._library import interpreting

from pskv import support
from pskv.errors import UnsupportedModelError
from pskv.tokenization import read_again

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX, _ROWS, _LENGTH = 48, 16, 12


@dataclass(frozen=True)
class BackendReport:
    """One way to hold the prefix.

    Attributes:
        name: The backend.
        error: Largest difference of a token's log-probability from one uncached pass per row, in
            nats.
        seconds: Of a call with 16 rows of 12 tokens behind 48, the second one.
    """

    name: str
    error: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        model: Its class.
        dtype: Of its weights.
        device: Of its embeddings.
        layers: The kind of each layer.
        windows: Layers that attend through a sliding window.
        refused: Why nothing can be shared, or None.
        hidden_error: Largest error of a final hidden state, relative to its norm.
        logits_error: The same of the logits, by the head taken apart.
        bound: What either may be.
        backends: Each that can run here.
        fastest: Of these, at the size tried.
        chat_survives: Whether a chat stays the same when it is written and read again, which
            `RoundTripFilter` needs; None without a tokenizer or template.
    """

    model: str
    dtype: str
    device: str
    layers: list[str]
    windows: list[int] = field(default_factory=list)
    refused: str | None = None
    hidden_error: float | None = None
    logits_error: float | None = None
    bound: float | None = None
    backends: list[BackendReport] = field(default_factory=list)
    fastest: str | None = None
    chat_survives: bool | None = None

    @property
    def works(self) -> bool:
        """Whether the model can be scored."""
        return self.refused is None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def diagnose(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Report:
    """Try everything on random tokens.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: To try its chat template as well.
    """
    from pskv.scorer import PrefixScorer

    inner = support.inner_model(model)
    parameter = next(model.parameters())
    text = inner.config.get_text_config()
    count = getattr(text, "num_hidden_layers", 0)
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * count)
    found: dict[str, Any] = {
        "model": type(inner).__name__, "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device), "layers": kinds,
        "chat_survives": _chat_survives(tokenizer),
    }  # fmt: skip
    names = ["split", "layerwise", "replicate"]
    if parameter.device.type == "cuda" or interpreting():
        names.insert(0, "fused")
    backends = []
    try:
        for name in names:
            scorer = PrefixScorer(model, backend=name)
            backends.append(_try(scorer, name))
            probed = scorer.probed
    except UnsupportedModelError as error:
        return Report(**found, refused=str(error))
    return Report(
        **found, windows=sorted(probed.windows), hidden_error=probed.hidden_error,
        logits_error=probed.logits_error, bound=probed.bound, backends=backends,
        fastest=min(backends, key=lambda backend: backend.seconds).name,
    )  # fmt: skip


@torch.no_grad()
def _try(scorer: Any, name: str) -> BackendReport:
    generator = np.random.default_rng(0)
    vocabulary = min(
        scorer.vocabulary_size,
        support.inner_model(scorer.model).get_input_embeddings().num_embeddings,
    )
    limit = getattr(
        support.inner_model(scorer.model).config.get_text_config(), "max_position_embeddings", 0
    )
    prefix = generator.integers(0, vocabulary, min(_PREFIX, max(1, (limit or 1024) - _LENGTH)))
    rows = np.tile(generator.integers(0, vocabulary, _LENGTH), (_ROWS, 1))
    places = np.arange(_ROWS) % _LENGTH
    rows[np.arange(_ROWS), places] = generator.integers(0, vocabulary, _ROWS)
    with scorer.prefill(prefix) as shared:
        scorer.score(shared, rows)
        begin = time.perf_counter()
        output = scorer.score(shared, rows)
        seconds = time.perf_counter() - begin
    error = 0.0
    for row, logprobs in zip(rows, output.token_logprobs, strict=True):
        whole = torch.from_numpy(np.concatenate([prefix, row])).to(scorer.device)
        logits = scorer.model(input_ids=whole[None], use_cache=False).logits[0].double().cpu()
        expected = logits[len(prefix) - 1 : -1].log_softmax(-1)[range(len(row)), row]
        error = max(error, float((logprobs.double() - expected).abs().max()))
    return BackendReport(name, error, seconds)


def _chat_survives(tokenizer: PreTrainedTokenizerBase | None) -> bool | None:
    if tokenizer is None or not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "The kettle is on."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return read_again(tokenizer, [ids]) == [ids]
