"""Attention over a shared prefix as an attention function of transformers.

Registered under the name ``pskv``. It needs no mask: what a packed row sees travels as a keyword
argument through the model's forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shared_kernels.models import register_attention
from shared_kernels.ops.prefix_attention import PrefixLayout, shared_prefix_attention

from pskv.generation import CURRENT

if TYPE_CHECKING:
    from torch import Tensor

    from pskv.generation import GrowingCall
    from pskv.prefix import PrefixCache

NAME = "pskv"


@dataclass
class PackedCall:
    """One forward pass over packed rows.

    Attributes:
        layout: What they see.
        cache: Keys and values of the prefix.
        impl: Of `shared_prefix_attention`.
        windows: Layers that were given a sliding window, filled in by the pass.
        layers: Layers that attended here.
    """

    layout: PrefixLayout
    cache: PrefixCache
    impl: str
    windows: set[int] = field(default_factory=set)
    layers: set[int] = field(default_factory=set)


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
    pskv: PackedCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend for `PackedCall`, or for the `GrowingCall` that is running.

    Query ``(B, Hq, T, D)``, with B of 1 for packed rows; output ``(B, T, Hq, Dv)``.
    """
    options: Any = {
        "scale": scaling, "window": sliding_window, "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.detach(),
    }  # fmt: skip
    index = module.layer_idx
    growing = CURRENT.get()
    if pskv is not None:
        pskv.layers.add(index)
        if sliding_window is not None:
            pskv.windows.add(index)
        layer = pskv.cache.held[index]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out, _ = shared_prefix_attention(
            q, k, v, layer.keys[: layer.length], layer.values[: layer.length], pskv.layout,
            impl=pskv.impl, **options,
        )  # fmt: skip
        return out[None], None
    if growing is None:
        raise RuntimeError("the attention 'pskv' runs only inside a PrefixScorer's calls")
    return _grow(growing, index, query, options), None


def _grow(call: GrowingCall, index: int, query: Tensor, options: dict[str, Any]) -> Tensor:
    """Attend to the prefix and to what the layer's update has stored."""
    batch, heads, queries, dim = query.shape
    own, held = call.cache.grown[index], call.cache.shared.held[index]
    layout, kept = call.layout(batch, queries, query.device, own.filled)
    q = query.transpose(1, 2).reshape(batch * queries, heads, dim)
    shared = [
        own.keys.new_empty(0, *own.keys.shape[2:]) if x is None else x[: held.length]
        for x in (held.keys, held.values)
    ]
    out, _ = shared_prefix_attention(
        q if kept is None else q[kept], own.keys.flatten(0, 1), own.values.flatten(0, 1),
        *shared, layout, impl=call.impl, **options,
    )  # fmt: skip
    if kept is not None:
        # padding attends to nothing
        out = out.new_zeros(batch * queries, *out.shape[1:]).index_copy_(0, kept, out)
    return out.view(batch, queries, *out.shape[1:])


register_attention(NAME, attend)
