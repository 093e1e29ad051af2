"""Which models can share a prefix, and whether this one does it right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pskv.attention import NAME
from pskv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = {"full_attention", "sliding_attention", "attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def inner_model(model: Any) -> Any:
    """Return the transformers model: under an adapter, the one that it adapts."""
    getter = getattr(model, "get_base_model", None)
    return getter() if callable(getter) else model


def _adapters(model: Any) -> dict[str, Any]:
    """Return the configurations of PEFT adapters, if the model has some."""
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


def check_model(model: Any) -> None:
    """Refuse what cannot work.

    Raises:
        UnsupportedModelError: Naming the part and what to do.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "get_output_embeddings", None)):
        raise UnsupportedModelError(f"model: expected a transformers model, got {name}")
    head = model.get_output_embeddings()
    if head is None or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model: expected a decoder with a language-model head, got {name}; load it by "
            "AutoModelForCausalLM"
        )
    if hasattr(head, "base_layer"):
        raise UnsupportedModelError(
            "model: its head carries an adapter; merge it (merge_and_unload), or leave the head "
            "out of the adapter's target_modules"
        )
    if any(getattr(c, "is_prompt_learning", False) for c in _adapters(model).values()):
        raise UnsupportedModelError(
            "model: its adapter puts virtual tokens in front of every row; put their embeddings "
            "into the prefix, or score it without a cache"
        )
    if not hasattr(head, "weight") or not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"model: its head is {type(head).__name__}, expected nn.Linear; "
            "quantise all but the head"
        )
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - _KINDS
    if kinds:
        raise UnsupportedModelError(
            f"model: {name} has layers of kind {', '.join(sorted(kinds))}, whose state cannot be "
            "shared between rows; score it without a cache"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"model: layers of {name} share keys with each other, which is not supported; score "
            "it without a cache"
        )
    check_state(model)


def check_state(model: Any) -> None:
    """Refuse a model in training mode, or one that must return attention weights."""
    if model.training:
        raise UnsupportedModelError(
            "model: it is in training mode, where dropout makes scores random; call model.eval()"
        )
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(
            "model: config.output_attentions is set, and attention weights are never formed here; "
            "set it to False"
        )


def check_length(model: Any, prefix: int, longest: int) -> None:
    """Refuse rows that reach beyond the model's positions.

    Raises:
        ValueError: With the numbers.
        UnsupportedModelError: Rotary angles that depend on the total length, beyond the length up
            to which they do not.
    """
    text = model.config.get_text_config()
    total = prefix + longest
    # the last token of a row is predicted and predicts nothing
    needed = total - 1 if longest else total
    limit = getattr(text, "max_position_embeddings", None)
    if limit and needed > limit:
        raise ValueError(
            f"continuations: the longest row has {longest} tokens after a prefix of {prefix}, "
            f"{total} in all, and the model has {limit} positions; shorten the prefix or the row"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for parameters in kinds:
        if parameters.get("rope_type") not in _LENGTH_DEPENDENT_ROPE:
            continue
        original = parameters.get("original_max_position_embeddings") or limit
        if original and needed > original:
            raise UnsupportedModelError(
                f"model: its rotary angles ({parameters['rope_type']}) depend on the total length "
                f"beyond {original} tokens, and this row has {total}; score it without a cache"
            )


def remedy(model: Any) -> str:
    """Return what to do about a model whose results differ over a shared prefix."""
    text = model.config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap and text._attn_implementation == "sdpa":
        return (
            f"in this version of transformers sdpa leaves out its attn_logit_softcapping = {cap}; "
            'load it with attn_implementation="eager"'
        )
    return "score it without a cache, and please report the model"


def walk(model: Any) -> list[Any]:
    """Return all modules; for what every score asks, many times as fast as ``modules()``."""
    found = [model]
    # the list grows while it is walked
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Return what a prefix depends on besides its tokens."""
    inner = inner_model(model)
    held = [p for module in walk(model) for p in module._parameters.values()]
    weights = tuple((p.data_ptr(), p._version) for p in held if p is not None)
    adapters = None
    if _adapters(model):
        # PEFT keeps what is active, and whether it is switched off, in each layer
        adapters = [
            (module.active_adapters, module.disable_adapters)
            for module in model.modules()
            if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
        ]
    text = inner.config.get_text_config()
    attention = text._attn_implementation
    return (
        hash(weights),
        str(adapters),
        str(next(model.parameters()).dtype),
        str(getattr(text, "rope_parameters", None)),
        attention if attention != NAME else None,
    )


def probe_tolerance(dtype: torch.dtype) -> float:
    """Return how far hidden states may be off, relative to their norm."""
    return {torch.float64: 1e-4, torch.float32: 1e-3}.get(dtype, 0.08)


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return the error of each hidden state ``(T, d)`` relative to its norm, ``(T,)``."""
    error = (found.float() - expected.float()).norm(dim=-1)
    return (error / expected.float().norm(dim=-1).clamp(min=1e-6)).nan_to_num(1e9)


def worst(model: Any, errors: Tensor) -> float:
    """Return the error to judge a model by: the largest.

    In 16 bits a router may send a token to another expert for a rounding's sake, in any two
    passes, so models with experts are judged by the median there.
    """
    text = model.config.get_text_config()
    experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts"))
    narrow = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return float(errors.median() if experts and narrow else errors.max())
