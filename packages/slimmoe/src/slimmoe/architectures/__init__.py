"""Families of mixture-of-experts models, as tables of their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimmoe.architectures.base import Architecture, Axis, Match, Row
from slimmoe.architectures.families import ALL
from slimmoe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAMILIES", "Architecture", "Axis", "Match", "Row", "architecture_of"]

_BY_TYPE = {family.model_type: family for family in ALL}
FAMILIES = tuple(_BY_TYPE)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the family of a configuration.

    Args:
        config: As ``config.json`` has it.

    Raises:
        UnsupportedModelError: It has no table.
    """
    found = _BY_TYPE.get(config.get("model_type", ""))
    if found is None:
        raise UnsupportedModelError(
            f"model_type: expected one of {list(_BY_TYPE)}, got {config.get('model_type')!r}"
        )
    return found
