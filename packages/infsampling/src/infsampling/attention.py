"""The sampler's attention, as an attention function of transformers.

Registered under the name ``infsampling``. It needs no mask: what a token sees travels as a keyword
argument through the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared_kernels.models import register_attention
from shared_kernels.ops.prefix_attention import shared_prefix_attention
from shared_kernels.ops.prefix_attention.decode import decode_attention
from shared_kernels.ops.prefix_attention.training import packed_prefix_attention

if TYPE_CHECKING:
    from shared_kernels.ops.prefix_attention import PrefixLayout
    from shared_kernels.ops.prefix_attention.training import PackedPrompts
    from torch import Tensor

    from infsampling.cache import PrefixStore, SlotCache

NAME = "infsampling"


@dataclass
class PrefillCall:
    """A chunk of one prompt.

    Attributes:
        store: Keys and values of the prompts; those of the chunk are written by its cache.
        layout: What the chunk sees.
    """

    store: PrefixStore
    layout: PrefixLayout


@dataclass
class DecodeCall:
    """The newest token of each slot.

    Attributes:
        cache: Of the slots; keys and values of the newest tokens are written by it.
        store: Keys and values of the prompts.
        tables: Lengths, starts, prefix lengths, order and tiles: see `decode_attention`.
        longest: Bound on the prompts' lengths.
    """

    cache: SlotCache
    store: PrefixStore
    tables: tuple[Tensor, ...]
    longest: int


@dataclass
class TrainingCall:
    """Prompts and all their completions at once, with gradients.

    Attributes:
        layout: Where they lie.
    """

    layout: PackedPrompts


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    infsampling: PrefillCall | DecodeCall | TrainingCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend for the call; query ``(B, Hq, T, D)``, output ``(B, T, Hq, Dv)``."""
    options: Any = {
        "scale": scaling, "window": sliding_window, "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.detach(),
    }  # fmt: skip
    index = module.layer_idx
    if infsampling is None:
        raise RuntimeError(
            "the attention 'infsampling' runs only inside calls of InfiniteSampler and GRPOTrainer"
        )
    # under autocast, position embeddings leave queries and keys wider than values
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(infsampling, TrainingCall):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options["sinks"] = s_aux
        return packed_prefix_attention(q, k, v, infsampling.layout, **options)[None], None
    shared_k, shared_v = infsampling.store.slabs(index)
    if isinstance(infsampling, PrefillCall):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out, _ = shared_prefix_attention(q, k, v, shared_k, shared_v, infsampling.layout, **options)
        return out[None], None
    cache = infsampling.cache
    out, _ = decode_attention(
        query[:, :, 0], *cache.slabs(index), shared_k, shared_v, *infsampling.tables,
        capacity=cache.capacity, longest=infsampling.longest, **options,
    )  # fmt: skip
    return out[:, None], None


register_attention(NAME, attend)
