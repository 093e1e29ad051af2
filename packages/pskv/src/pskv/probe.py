"""The comparison at the start: a packed pass against one ordinary pass per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pskv import support
from pskv.attention import PackedCall
from pskv.errors import UnsupportedModelError
from pskv.planner import pack, sort_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from pskv.passes import Passes
    from pskv.prefix import SharedPrefix

_PREFIX = 11


@dataclass(frozen=True)
class ProbeResult:
    """What the comparison found.

    Attributes:
        hidden_error: Largest error of a final hidden state, relative to its norm.
        logits_error: The same of logits, by the head taken apart.
        bound: What either may be.
        windows: Layers that were told of a sliding window.
    """

    hidden_error: float
    logits_error: float
    bound: float
    windows: frozenset[int]


@torch.no_grad()
def probe(passes: Passes, prefill: Callable[[np.ndarray], SharedPrefix]) -> ProbeResult:
    """Compare on random tokens.

    Raises:
        UnsupportedModelError: They differ, or a layer did not take part.
    """
    inner = passes.inner
    vocabulary = min(
        passes.head.module.weight.shape[0], inner.get_input_embeddings().num_embeddings
    )
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, 24)
    rows = [ids[_PREFIX:].copy() for _ in range(4)]
    for place, row in zip((9, 9, 11), rows[1:], strict=True):
        row[place] = (row[place] + 1 + place) % vocabulary
    rows.append(generator.integers(0, vocabulary, 5))
    name = type(inner).__name__
    remedy = support.remedy(inner)
    shared = prefill(ids[:_PREFIX])
    layers = inner.config.get_text_config().num_hidden_layers
    if shared.cache.get_seq_length() != _PREFIX or len(shared.cache.held) != layers:
        raise UnsupportedModelError(f"model: {name} does not use its cache; {remedy}")
    order, common = sort_rows(rows)
    packed = pack(rows, order, common, 3)
    call = PackedCall(packed.layout(_PREFIX), shared.cache, passes.packed_impl)
    hidden = passes.packed(shared, packed, call.impl, call=call)
    if call.layers != set(range(layers)):
        raise UnsupportedModelError(
            f"model: {len(call.layers)} of {layers} layers of {name} attend through "
            f"transformers' attention functions; {remedy}"
        )
    kinds = getattr(inner.config.get_text_config(), "layer_types", None) or []
    sliding = {index for index, kind in enumerate(kinds) if kind == "sliding_attention"}
    if not sliding <= call.windows:
        raise UnsupportedModelError(
            f"model: layer {min(sliding - call.windows)} of {name} has a window that its "
            f"attention function is not told; {remedy}"
        )
    bound = support.probe_tolerance(hidden.dtype)
    errors = []
    for number, row in enumerate(rows):
        whole = passes.tensor(np.concatenate([ids[:_PREFIX], row]))[None]
        expected = passes.base(input_ids=whole, use_cache=False).last_hidden_state[0]
        found = hidden[passes.tensor(packed.place(number, np.arange(len(row))))]
        errors.append(support.relative_errors(found, expected[_PREFIX:]))
    hidden_error = support.worst(inner, torch.cat(errors))
    if hidden_error > bound:
        raise UnsupportedModelError(
            f"model: hidden states of {name} over a shared prefix differ from ordinary ones "
            f"by {hidden_error:.1e} of their norm, more than {bound:.0e}; {remedy}"
        )
    logits = inner(input_ids=whole, use_cache=False).logits[0]
    head = support.relative_errors(passes.head.logits(expected), logits)
    logits_error = support.worst(inner, head)
    if logits_error > bound:
        raise UnsupportedModelError(
            f"model: the head of {name} is more than a linear layer, a scale and a cap: logits "
            f"differ by {logits_error:.1e} of their norm; {remedy}"
        )
    shared.close()
    return ProbeResult(hidden_error, logits_error, bound, frozenset(call.windows))
