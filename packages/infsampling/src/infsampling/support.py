"""Which models the sampler can serve."""

from __future__ import annotations

from typing import Any

from infsampling.errors import UnsupportedModelError

_KINDS = {"full_attention", "sliding_attention", "attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_INSTEAD = "use its own `generate`"


def check_model(model: Any) -> None:
    """Refuse what would be wrong.

    Raises:
        UnsupportedModelError: Naming the part and what to do.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "get_output_embeddings", None)):
        raise UnsupportedModelError(
            f"model: expected a transformers model, got {name}; load it by AutoModelForCausalLM"
        )
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"model: expected a decoder with a language-model head, got {name}; {_INSTEAD}"
        )
    text = config.get_text_config()
    if text is not config:
        raise UnsupportedModelError(
            f"model: {name} takes more than text, which is not supported; {_INSTEAD}"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - _KINDS
    if kinds or hasattr(text, "linear_num_key_heads") or hasattr(text, "mamba_d_state"):
        listed = ", ".join(sorted(kinds)) or "linear attention"
        raise UnsupportedModelError(
            f"model: {name} has layers of kind {listed}, whose state is not keys and values; "
            f"{_INSTEAD}"
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"model: {name} has latent attention (MLA), which is not supported; {_INSTEAD}"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"model: layers of {name} share keys with each other, which is not supported; "
            f"{_INSTEAD}"
        )
    if not getattr(type(model), "_supports_attention_backend", False):
        inner = getattr(model, "get_base_model", None)
        if not callable(inner) or not getattr(type(inner()), "_supports_attention_backend", False):
            raise UnsupportedModelError(
                f"model: {name} does not let transformers choose its attention; {_INSTEAD}"
            )


def check_length(model: Any, longest: int, most: int, limit: int | None) -> None:
    """Refuse prompts whose completions could leave the model's positions.

    Raises:
        ValueError: With the numbers.
        UnsupportedModelError: Rotary angles that depend on the total length.
    """
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"prompt_ids: the longest prompt has {longest} tokens, max_prompt_tokens is {limit}; "
            "shorten the prompt or raise the limit"
        )
    # the last token of a completion is predicted and predicts nothing
    total = longest + most - 1
    if positions and total > positions:
        raise ValueError(
            f"prompt_ids: a prompt of {longest} tokens and {most} new ones need {total} positions, "
            f"and the model has {positions}; shorten the prompt or lower max_new_tokens"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    for parameters in kinds:
        if parameters.get("rope_type") not in _LENGTH_DEPENDENT_ROPE:
            continue
        original = parameters.get("original_max_position_embeddings") or positions
        if original and total > original:
            raise UnsupportedModelError(
                f"model: its rotary angles ({parameters['rope_type']}) depend on the total length "
                f"beyond {original} tokens, and {total} may be reached; {_INSTEAD}"
            )
