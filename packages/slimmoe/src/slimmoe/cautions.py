"""What a plan may do, and its user should know of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from slimmoe.calibration.statistics import ExpertStatistics
    from slimmoe.configuration import CompressionConfig

#: Below it, matrix units of GPUs are not filled.
_NARROW = 64


def period(kinds: Sequence[str]) -> int:
    """Return how many layers make a pattern that is there twice at least; 0 without one."""
    for size in range(1, len(kinds) // 2 + 1):
        if all(a == b for a, b in zip(kinds, kinds[size:], strict=False)):
            return size
    return 0


def of_layers(kinds: Sequence[str], layers: Sequence[int]) -> Iterator[str]:
    """Warn of layers that are left of a pattern, such as three of linear attention and a full one.

    Args:
        kinds: Of all layers.
        layers: That are kept.
    """
    size = period(kinds)
    if not size or len(layers) == len(kinds):
        return
    follows = all(kinds[layer] == kinds[at % size] for at, layer in enumerate(layers))
    # a last pattern that was not whole may stay as it was
    if not follows or len(layers) % size not in (0, len(kinds) % size):
        yield (
            f"layers: {len(layers)} layers are left of a pattern of {size}, and it is broken; "
            "drop whole ones to keep it"
        )


def of_sizes(
    options: CompressionConfig, config: Mapping[str, object], neurons: str
) -> Iterator[str]:
    """Warn of sizes that are made narrower than hardware likes.

    Args:
        options: That are asked for.
        config: Of the model that goes in.
        neurons: Its field of an expert's width.
    """
    for name, field in (("hidden_size", "hidden_size"), ("moe_intermediate_size", neurons)):
        size = getattr(options, name)
        if size is not None and size != config[field] and size < _NARROW:
            yield f"{name}: {size} is below {_NARROW}, which fills no matrix unit of a GPU"


def of_experts(
    statistics: Mapping[int, ExpertStatistics], places: Sequence[int], least: int
) -> Iterator[str]:
    """Warn of experts that calibration has hardly seen.

    Args:
        statistics: By layer.
        places: Layers in which something is chosen by them.
        least: Tokens that an expert should have been selected for.
    """
    for place in places:
        few = torch.nonzero(statistics[place].count < least).flatten().tolist()
        if few:
            yield (
                f"layer {place}: experts {few} were selected for fewer than {least} tokens of the "
                "calibration; give it more or other data"
            )
