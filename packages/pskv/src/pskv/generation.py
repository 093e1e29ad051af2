"""Generate after many suffixes of one prefix, whose keys and values stay single."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import message
from shared_kernels.models import attention_of
from shared_kernels.ops.prefix_attention import PrefixLayout
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pskv.batching import attempt

if TYPE_CHECKING:
    from collections.abc import Generator

    from pskv.passes import Passes
    from pskv.prefix import PrefixCache, SharedPrefix

_REFUSED = {
    "assistant_model": "it takes tokens back, which rows of different lengths cannot",
    "prompt_lookup_num_tokens": "it takes tokens back, which rows of different lengths cannot",
    "past_key_values": "the prefix is the cache",
    "inputs_embeds": "pass token ids as suffixes",
    "return_dict_in_generate": "only tokens are returned; score them with `score`",
    "prefill_chunk_size": "prefill the prefix with `chunk` instead",
}


class GrowingLayer(CacheLayerMixin):
    """Keys and values of the rows' own tokens; those of the prefix stay where they are.

    Own keys lie in one arena ``(rows * capacity, heads, dim)``, padding in front included.
    """

    is_sliding = False
    is_compileable = False
    keys: Any
    values: Any

    def __init__(self, prefix: int, capacity: int) -> None:
        super().__init__()
        self.prefix, self.capacity = prefix, capacity
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values ``(rows, heads, tokens, dim)``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = key_states.shape[0]
        self.keys, self.values = (
            x.new_zeros(rows, self.capacity, x.shape[1], x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; attention looks them up here."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[2]
        for slab, x in ((self.keys, key_states), (self.values, value_states)):
            slab[:, self.filled : end] = x.transpose(1, 2)
        self.filled = end
        return key_states, value_states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row ``beam_idx[i]``."""
        if self.is_initialized:
            index = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys[index], self.values[index]

    def get_seq_length(self) -> int:
        """Return the tokens of a row, prefix and padding included."""
        return self.prefix + self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and offset of the keys that a mask covers."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit that a mask must know of."""
        return -1

    get_max_cache_shape = get_max_length


class GrowingCache(Cache):
    """One `GrowingLayer` per layer of the model, behind one prefix."""

    def __init__(self, prefix: PrefixCache, capacity: int) -> None:
        held = prefix.get_seq_length()
        self.shared = prefix
        self.grown = [GrowingLayer(held, capacity) for _ in prefix.held]
        super().__init__(layers=[*self.grown])


class GrowingCall:
    """What each token of a generating batch sees; the layout is made once for all layers.

    Args:
        cache: Of the batch.
        pads: Padding in front of each row.
        impl: Of `shared_prefix_attention`.
    """

    def __init__(self, cache: GrowingCache, pads: np.ndarray, impl: str) -> None:
        self.cache, self.pads, self.impl = cache, pads, impl
        self._made: tuple[int, int] = (-1, -1)
        self._layout: tuple[PrefixLayout, Tensor | None] | None = None

    def layout(self, rows: int, queries: int, device: torch.device, filled: int) -> Any:
        """Return the layout, and which of the batch's tokens are no padding if not all are."""
        if self._layout is None or self._made != (queries, filled):
            pads = np.repeat(self.pads, rows // len(self.pads))
            hidden = np.clip(pads - (filled - queries), 0, queries)
            starts = np.arange(rows) * self.cache.grown[0].capacity + pads
            layout = PrefixLayout.build(
                (queries - hidden).tolist(),
                shared=(0, self.cache.shared.get_seq_length()),
                keys=list(zip(starts.tolist(), (filled - pads).tolist(), strict=True)),
            )
            kept = None
            if hidden.any():
                real = np.arange(queries)[None] >= hidden[:, None]
                kept = torch.from_numpy(np.flatnonzero(real)).to(device)
            self._layout, self._made = (layout, kept), (queries, filled)
        return self._layout


CURRENT: ContextVar[GrowingCall | None] = ContextVar("pskv_growing_call", default=None)


@contextmanager
def growing(call: GrowingCall) -> Generator[None]:
    """Let the attention ``pskv`` serve this batch."""
    token = CURRENT.set(call)
    try:
        yield
    finally:
        CURRENT.reset(token)


def check_options(options: dict[str, Any]) -> None:
    """Refuse options of `generate` that cannot work here.

    Raises:
        ValueError: Naming the option.
    """
    for name, why in _REFUSED.items():
        if options.get(name):
            raise ValueError(message(name, "none", options[name], why))


def generate(
    passes: Passes, shared: SharedPrefix, rows: list[np.ndarray], options: dict[str, Any]
) -> list[Tensor]:
    """Run `generate` of the model on rows behind a prefix, and return the new tokens of each.

    Halves the batch when memory runs out, and draws what it would have drawn.

    Raises:
        torch.OutOfMemoryError: One row does not fit.
    """
    found: list[Tensor] = []
    size, low = len(rows), 0
    while low < len(rows):
        state = _random_state(passes.device)
        part = rows[low : low + size]
        made, problem = attempt(lambda part=part: _batch(passes, shared, part, options))
        if made is not None:
            found += made
            low += len(part)
            continue
        if len(part) == 1:
            raise torch.OutOfMemoryError(
                f"{problem}; one row does not fit: lower max_new_tokens, or free memory"
            )
        _set_random_state(passes.device, state)
        size = len(part) // 2
    return found


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _batch(
    passes: Passes, shared: SharedPrefix, rows: list[np.ndarray], options: dict[str, Any]
) -> list[Tensor]:
    from pskv.attention import NAME

    held = shared.length
    longest = max(map(len, rows))
    config = passes.inner.generation_config
    asked = options.get("generation_config")
    limit = options.get("max_new_tokens") or getattr(asked, "max_new_tokens", None)
    limit = limit or config.max_new_tokens or 20
    eos = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else eos
    pad = pad[0] if isinstance(pad, list) else pad
    ids = np.full((len(rows), held + longest), 0 if pad is None else pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    if shared.ids is None:
        raise ValueError("prefix: generating needs its token ids; prefill from ids, not embeddings")
    ids[:, :held], mask[:, :held] = shared.ids.numpy(), 1
    for line, seen, row in zip(ids, mask, rows, strict=True):
        if len(row):
            line[-len(row) :], seen[-len(row) :] = row, 1
    pads = np.array([longest - len(row) for row in rows])
    cache = GrowingCache(shared.cache, longest + limit)
    call = GrowingCall(cache, pads, passes.packed_impl)
    with attention_of(passes.configs, NAME), growing(call):
        found = passes.model.generate(
            input_ids=passes.tensor(ids), attention_mask=passes.tensor(mask),
            past_key_values=cache, **{"pad_token_id": pad, **options, "max_new_tokens": limit},
        )[:, ids.shape[1] :]  # fmt: skip
    stops = options.get("eos_token_id", getattr(asked, "eos_token_id", None) or eos)
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    return [_until(line, stops) for line in found.cpu()]


def _until(line: Tensor, stops: list[int]) -> Tensor:
    """Cut off what follows the first end-of-sequence token."""
    ends = torch.isin(line, torch.tensor(stops, dtype=line.dtype)).nonzero()
    return line[: int(ends[0]) + 1] if len(ends) else line
