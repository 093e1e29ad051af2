"""Keys and values: of each prompt once, and of the samples in their slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from torch import Tensor


def _make(like: Tensor, *shape: int) -> Tensor:
    slab = like.new_zeros(shape)
    # a compiled step serves any number of tokens
    torch._dynamo.maybe_mark_dynamic(slab, 0)
    return slab


class _Layer(CacheLayerMixin):
    """Keys and values of one layer in arenas ``(tokens, heads, dim)``, written where `place` says.

    Attributes:
        place: int64, where the next keys go.
    """

    is_sliding = False
    is_compileable = True
    keys: Any
    values: Any

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.place: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values ``(batch, heads, tokens, dim)``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            _make(x, self.tokens, x.shape[1], x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``(B, heads, T, dim)``, B or T of 1; attention finds them."""
        # under autocast, a position embedding leaves keys wider than values
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for slab, x in ((self.keys, key_states), (self.values, value_states)):
            slab.index_copy_(0, self.place, x.transpose(1, 2).flatten(0, 1))
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return 0: positions are given to the model."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and offset of the keys that a mask covers: there is no mask."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit that a mask must know of."""
        return -1

    get_max_cache_shape = get_max_length


class _Arena(Cache):
    """One `_Layer` per layer of the model."""

    def __init__(self, layers: int, tokens: int) -> None:
        self.held = [_Layer(tokens) for _ in range(layers)]
        self.tokens = tokens
        super().__init__(layers=[*self.held])

    def write_to(self, place: Tensor) -> None:
        """Say where the next keys of all layers go."""
        for layer in self.held:
            layer.place = place

    def slabs(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(tokens, heads, dim)`` of a layer."""
        layer = self.held[index]
        return layer.keys, layer.values

    def all_slabs(self) -> list[Tensor]:
        """Return keys and values of all layers, one after the other."""
        return [slab for layer in self.held for slab in (layer.keys, layer.values)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, as far as they are allocated."""
        return sum(slab.nbytes for slab in self.all_slabs() if slab is not None)


class PrefixStore(_Arena):
    """Keys and values of prompts, each unique one once, end to end.

    One token more belongs to no prompt.
    """

    def __init__(self, layers: int, tokens: int) -> None:
        super().__init__(layers, tokens + 1)


class SlotCache(_Arena):
    """Keys and values of the samples' own tokens, ``capacity`` for each of ``places`` slots.

    One token more belongs to no slot: idle slots write there.
    """

    def __init__(self, layers: int, places: int, capacity: int) -> None:
        super().__init__(layers, places * capacity + 1)
        self.places, self.capacity = places, capacity

    def allocate(self, store: PrefixStore) -> None:
        """Allocate what the prompts' keys and values say the model has."""
        for mine, theirs in zip(self.held, store.held, strict=True):
            if not mine.is_initialized:
                for name in ("keys", "values"):
                    like = getattr(theirs, name)
                    setattr(mine, name, _make(like, self.tokens, *like.shape[1:]))
                mine.dtype, mine.device = theirs.dtype, theirs.device
                mine.is_initialized = True

    def region(self, slot: int, length: int) -> list[Tensor]:
        """Return views of the first ``length`` keys and values of a slot, of all layers."""
        first = slot * self.capacity
        return [slab[first : first + length] for slab in self.all_slabs()]


class Parked:
    """Keys and values of a sample outside its slot, in host memory.

    On a CUDA device the copy is one gather there and one transfer through page-locked memory.

    Args:
        region: Views of what to keep.
    """

    def __init__(self, region: list[Tensor]) -> None:
        flat = torch.cat([part.reshape(-1) for part in region])
        if flat.is_cuda:
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            flat = host
        self.data = flat

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.data.nbytes

    def restore(self, region: list[Tensor]) -> None:
        """Write what was kept to views of the same shapes, bit for bit."""
        flat = self.data.to(region[0].device, non_blocking=True)
        parts = flat.split([part.numel() for part in region])
        for target, part in zip(region, parts, strict=True):
            target.copy_(part.view(target.shape))
