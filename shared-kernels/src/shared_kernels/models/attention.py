"""Let a transformers model attend by a function of ours for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def register_attention(name: str, attend: Callable[..., Any]) -> None:
    """Register an attention function with transformers, and that it needs no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _no_mask)


def configs_of(model: Any) -> list[Any]:
    """Return the configurations that a model and its parts read their attention from."""
    found = [m.__dict__["config"] for m in model.modules() if "config" in m.__dict__]
    return list({id(config): config for config in found}.values())


@contextmanager
def attention_of(configs: list[Any], name: str) -> Generator[None]:
    """Let a model attend by the function of this name, and set back what it had."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config._attn_implementation_internal = value
