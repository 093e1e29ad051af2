"""What each way of scoring holds in memory, counted from a model's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shared_kernels._checks import check_range

from pskv.batching import LARGEST


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes beyond the weights, for N rows of S tokens behind a prefix of P.

    Activations are those of one layer, the most that exists at a time without gradients, and
    estimated from its widths; allocators round up, and libraries take workspaces beyond this.

    Attributes:
        weights: Of the model.
        prefix: Keys and values of the prefix, once.
        per_token: Activations of a token in a forward pass.
        micro_batch: Tokens of a pass that are assumed.
        shared: What this package holds: the prefix and the activations of a pass.
        layerwise: The prefix, and its copies for all rows in one layer.
        replicate: Copies of the prefix and the rows' own keys for all rows and layers.
        no_cache: Activations of all rows with their prefix.
        logits: Logits of all positions of all rows in the model's dtype, which the last three
            ways compute in addition if nothing keeps them from it; 128 MB at most here.
    """

    weights: int
    prefix: int
    per_token: int
    micro_batch: int
    shared: int
    layerwise: int
    replicate: int
    no_cache: int
    logits: int

    def to_dict(self) -> dict[str, int]:
        """Return the numbers by name."""
        return asdict(self)


def memory_plan(
    model: Any, prefix: int, rows: int, length: int, *, micro_batch: int = LARGEST
) -> MemoryPlan:
    """Count what scoring would hold.

    Args:
        model: A transformers model, on any device (``meta`` too).
        prefix: Tokens of the prefix, P.
        rows: Continuations, N.
        length: Tokens of each, targets included, S.
        micro_batch: Tokens of a forward pass at most.

    Raises:
        ValueError: A negative number, or no rows or tokens.
    """
    check_range("prefix", prefix, 0, 2**31, "0 is no prefix")
    for name, value in (("rows", rows), ("length", length), ("micro_batch", micro_batch)):
        check_range(name, value, 1, 2**31, "at least one")
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    size = next(model.parameters()).element_size()
    per_layer = 2 * keys * dim * size
    # residual, its norm, the sum; queries, keys, values and what they give; gate, up and product
    per_token = size * (4 * width + (2 * heads + 2 * keys) * dim + 3 * inner)
    held = prefix * per_layer * layers
    own = rows * length
    passed = min(micro_batch, own)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return MemoryPlan(
        weights=weights,
        prefix=held,
        per_token=per_token,
        micro_batch=passed,
        shared=held + passed * per_token,
        layerwise=held + 2 * rows * (prefix + length) * per_layer + own * per_token,
        replicate=rows * (prefix + length) * per_layer * layers + own * per_token,
        no_cache=rows * (prefix + length) * per_token,
        logits=own * config.vocab_size * size,
    )
