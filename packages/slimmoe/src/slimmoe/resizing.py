"""The configuration of what comes out: that of what goes in, with other sizes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from slimmoe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from slimmoe.architectures import Architecture

#: Lists with an entry for each layer.
_PER_LAYER = ("layer_types", "mlp_layer_types")
#: Lists of something else, whose length may be that of the layers by chance.
_OTHER_LISTS = ("architectures", "eos_token_id", "mlp_only_layers", "bad_words_ids")


def resized(
    family: Architecture,
    config: Mapping[str, Any],
    *,
    layers: Sequence[int],
    hidden: int,
    experts: int,
    selected: int,
    neurons: int,
    mtp: bool,
) -> dict[str, Any]:
    """Return the configuration of a compressed model.

    Args:
        family: Of the model.
        config: Of what is compressed, as ``config.json`` has it.
        layers: Numbers of the kept layers.
        hidden: Channels.
        experts: Routed experts of a layer.
        selected: Experts of a token.
        neurons: Of a routed expert.
        mtp: Whether MTP modules stay.

    Raises:
        UnsupportedModelError: Its class cannot be told so.
    """
    made = copy.deepcopy(dict(config))
    count = int(made["num_hidden_layers"])
    made |= {"num_hidden_layers": len(layers), "num_experts_per_tok": selected}
    for key in family.experts:
        if made.get(key) is not None:
            made[key] = experts
    made[family.neurons] = neurons
    if hidden != made["hidden_size"]:
        if not made.get("head_dim"):
            # it would follow from hidden_size
            made["head_dim"] = made["hidden_size"] // made["num_attention_heads"]
        made["hidden_size"] = hidden
    if len(layers) != count:
        _renumber(made, layers, count)
    if family.mtp_layers and family.mtp_layers in made and not mtp:
        made[family.mtp_layers] = 0
    return made


def _renumber(made: dict[str, Any], layers: Sequence[int], count: int) -> None:
    for key, value in made.items():
        if key in _PER_LAYER and value is not None:
            made[key] = [value[layer] for layer in layers]
        elif isinstance(value, list) and len(value) == count and key not in _OTHER_LISTS:
            raise UnsupportedModelError(
                f"config.json: {key} has an entry for each layer, and it is not known what it is"
            )
    step = made.get("decoder_sparse_step")
    if step is not None:
        listed = made.get("mlp_only_layers") or []
        dense = {layer for layer in range(count) if (layer + 1) % step or layer in listed}
        # every how many layers experts come depends on numbers that change
        made["decoder_sparse_step"] = 1
        made["mlp_only_layers"] = [new for new, layer in enumerate(layers) if layer in dense]
    if made.get("first_k_dense_replace") is not None:
        first = made["first_k_dense_replace"]
        made["first_k_dense_replace"] = sum(layer < first for layer in layers)
    if made.get("max_window_layers") is not None:
        first = made["max_window_layers"]
        made["max_window_layers"] = sum(layer < first for layer in layers)
