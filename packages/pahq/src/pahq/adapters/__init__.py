"""Families of models, taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.adapters.gemma2 import Gemma2Adapter
from pahq.adapters.gpt2 import GPT2Adapter
from pahq.adapters.gpt_neox import GPTNeoXAdapter
from pahq.adapters.llama import LlamaAdapter
from pahq.adapters.olmo2 import Olmo2Adapter
from pahq.adapters.tracr import TracrAdapter
from pahq.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pahq.adapters.base import Adapter

ADAPTERS: Mapping[str, type[Adapter]] = {
    "gemma2": Gemma2Adapter,
    "gpt2": GPT2Adapter,
    "gpt_neox": GPTNeoXAdapter,
    "llama": LlamaAdapter,
    "mistral": LlamaAdapter,
    "olmo2": Olmo2Adapter,
    "qwen2": LlamaAdapter,
    "qwen3": LlamaAdapter,
    "tracr": TracrAdapter,
}


def adapter_of(model: Any) -> Adapter:
    """Return the adapter of a model's family.

    Raises:
        UnsupportedModelError: There is none.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in ADAPTERS:
        raise UnsupportedModelError(
            f"model: expected one of the families {', '.join(sorted(ADAPTERS))}, got {family!r}"
        )
    return ADAPTERS[family](model)
