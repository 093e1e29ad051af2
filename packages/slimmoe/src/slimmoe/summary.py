"""How large a model is, and what a plan makes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from slimmoe.architectures import Axis, architecture_of
from slimmoe.rewrite import Rewriter
from slimmoe.weights import Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slimmoe.planning import CompressionPlan


@dataclass(frozen=True)
class Sizes:
    """A model in numbers.

    Attributes:
        layers: Of the decoder.
        hidden_size: Channels of the residual stream.
        experts: Routed experts of a layer.
        experts_per_token: How many of them a token goes to.
        neurons: Of a routed expert.
        parameters: All of them, with modules of MTP.
        mtp_parameters: Those of modules of MTP.
        active_parameters: Those that a token goes through in the decoder: all but the routed
            experts that it does not go to, with one row of the embeddings.
        bytes: Of the weights.
        kv_bytes_per_token: Of the cache of keys and values, in the dtype of the weights; layers of
            linear attention have none.
    """

    layers: int
    hidden_size: int
    experts: int
    experts_per_token: int
    neurons: int
    parameters: int
    mtp_parameters: int
    active_parameters: int
    bytes: int
    kv_bytes_per_token: int


def sizes(model: Any, plan: CompressionPlan | None = None) -> Sizes:
    """Return how large a model is, or what comes out of it.

    Nothing is read but the names and shapes of tensors.

    Args:
        model: A folder, a model of transformers, or a `slimmoe.weights.Source`.
        plan: Of it; None for the model as it is.
    """
    source = model if isinstance(model, Source) else Source(model)
    if plan is None:
        config = source.config
        told = [(match, source.weights.shape(name), source.weights.dtype(name))
                for name, match in source.matches.items()]  # fmt: skip
    else:
        config = plan.config
        told = []
        for out in Rewriter(source, plan).outputs():
            told.append((source.family.match(out.name, config), out.shape, out.dtype))
    family = architecture_of(config)
    count, selected = family.count(config), int(config["num_experts_per_tok"])
    whole = routed = mtp = size = 0
    for match, shape, dtype in told:
        numbers = prod(shape)
        whole += numbers
        size += numbers * dtype.itemsize
        axes = match.row.axes
        if match.mtp is not None:
            mtp += numbers
        elif match.expert is not None or (Axis.EXPERT in axes and len(axes) > 1
                                          and not match.row.router):  # fmt: skip
            routed += numbers
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    active = whole - mtp - routed + routed * selected // count
    if not config.get("tie_word_embeddings"):
        active -= (vocabulary - 1) * hidden
    width = max((dtype.itemsize for _, _, dtype in told), default=2)
    return Sizes(
        int(config["num_hidden_layers"]), hidden, count, selected, int(config[family.neurons]),
        whole, mtp, active, size, _cached(config) * width,
    )  # fmt: skip


def _cached(config: Mapping[str, Any]) -> int:
    """Return how many numbers the cache holds for each token."""
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or ["full_attention"] * layers
    layers = sum(kind != "linear_attention" for kind in kinds)
    if config.get("kv_lora_rank"):
        # what keys and values of all heads are made from
        return layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]))
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * layers * heads * int(head)


def compared(model: Any, plan: CompressionPlan) -> dict[str, dict[str, int]]:
    """Return sizes of a model ``before`` and ``after`` a plan."""
    source = model if isinstance(model, Source) else Source(model)
    return {"before": asdict(sizes(source)), "after": asdict(sizes(source, plan))}
