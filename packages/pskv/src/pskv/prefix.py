"""The prefix: its keys and values, held once, and what a scorer may do with them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["SharedPrefix"]


class PrefixLayer(CacheLayerMixin):
    """Keys ``(tokens, heads, dim)`` and values of one layer, full-length whatever its window.

    What `update` does depends on the mode: ``append`` stores the new keys and returns all of them
    as views; ``read`` returns the new ones alone, for attention that looks the others up here;
    ``expand`` returns both joined, a copy for every row of the batch, and stores nothing.
    """

    is_sliding = False
    is_compileable = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.room = 0
        self.mode = "append"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values ``(1, heads, tokens, dim)``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_empty(self.room, x.shape[1], x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values ``(batch, heads, tokens, dim)`` as the mode says."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.mode == "read":
            return key_states, value_states
        new = (key_states, value_states)
        if self.mode == "expand":
            held = (x[: self.length].transpose(0, 1)[None] for x in (self.keys, self.values))
            joined = [
                torch.cat([old.expand(x.shape[0], -1, -1, -1), x], 2)
                for old, x in zip(held, new, strict=True)
            ]
            return joined[0], joined[1]
        end = self.length + key_states.shape[2]
        self.reserve(end)
        for slab, x in zip((self.keys, self.values), new, strict=True):
            slab[self.length : end] = x[0].transpose(0, 1)
        self.length = end
        keys, values = (x[:end].transpose(0, 1)[None] for x in (self.keys, self.values))
        return keys, values

    def reserve(self, length: int) -> None:
        """Make room for so many tokens, now or when the first come."""
        if not self.is_initialized:
            self.room = length
        elif self.keys.shape[0] < length:
            for name in ("keys", "values"):
                slab = getattr(self, name)
                larger = slab.new_empty(length, *slab.shape[1:])
                larger[: self.length] = slab[: self.length]
                setattr(self, name, larger)

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and offset of the keys that a mask covers."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length


class PrefixCache(Cache):
    """One `PrefixLayer` per layer of the model."""

    def __init__(self, layers: int) -> None:
        self.held = [PrefixLayer() for _ in range(layers)]
        super().__init__(layers=[*self.held])

    @contextmanager
    def mode(self, name: str) -> Generator[None]:
        """Set the mode of all layers, and set it back."""
        before = [layer.mode for layer in self.held]
        for layer in self.held:
            layer.mode = name
        try:
            yield
        finally:
            for layer, mode in zip(self.held, before, strict=True):
                layer.mode = mode

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        for layer in self.held:
            layer.length = min(layer.length, length)


class SharedPrefix:
    """A prefix that a `PrefixScorer` has computed; a context manager that frees it.

    It stays in memory and is never written anywhere. Scoring reads it and never changes it.

    Attributes:
        ids: int64 ``(P,)`` on the CPU, its tokens; None if it was given as embeddings.
        cache: Keys and values.
        last_hidden: ``(1, d)``, final hidden state of the last token; None if P is 0.
        fingerprint: Of the model that computed it.
    """

    def __init__(
        self,
        ids: Tensor | None,
        cache: PrefixCache,
        last_hidden: Tensor | None,
        fingerprint: tuple[Any, ...],
    ) -> None:
        self.ids, self.cache, self.last_hidden = ids, cache, last_hidden
        self.fingerprint = fingerprint
        self.closed = False
        #: The text it was encoded from, if it was a text.
        self.text: str | None = None

    @property
    def length(self) -> int:
        """Number of tokens, P."""
        return self.cache.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        slabs = [x for layer in self.cache.held for x in (layer.keys, layer.values)]
        return sum(x.nbytes for x in slabs if x is not None)

    def addresses(self) -> tuple[int, ...]:
        """Return where keys and values lie, and how many there are."""
        slabs = [x for layer in self.cache.held for x in (layer.keys, layer.values)]
        return self.length, *(0 if x is None else x.data_ptr() for x in slabs)

    def checksums(self) -> list[Tensor]:
        """Return the sum of the bits of each layer's keys and values, to see that none changed."""
        sums = []
        for layer in self.cache.held:
            for slab in (layer.keys, layer.values):
                if slab is not None:
                    bits = slab[: layer.length].contiguous().view(torch.uint8)
                    weights = torch.arange(1, bits.shape[-1] + 1, device=bits.device)
                    sums.append((bits.long() * weights).sum())
        return sums

    def close(self, *, erase: bool = False) -> None:
        """Free keys and values, after overwriting them with zeros if asked to."""
        for layer in self.cache.held:
            if erase and layer.keys is not None:
                layer.keys.zero_()
                layer.values.zero_()
            layer.keys = layer.values = None
            layer.length, layer.is_initialized = 0, False
        self.last_hidden, self.closed = None, True

    def __enter__(self) -> SharedPrefix:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SharedPrefix({self.length} tokens, {self.nbytes / 2**20:.1f} MiB)"
