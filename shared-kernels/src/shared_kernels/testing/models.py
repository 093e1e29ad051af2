"""Tiny random models of many architectures, each with an input its loss can be computed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARCHITECTURES", "DECODERS", "tiny_inputs", "tiny_model"]

_VOCAB = 96


def _sizes(**extra: Any) -> dict[str, Any]:
    base = {
        "vocab_size": _VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return base | extra


def _opt(t: Any, **kw: Any) -> nn.Module:
    sizes = _sizes(ffn_dim=48, word_embed_proj_dim=32, tie_word_embeddings=False, dropout=0.0, **kw)
    sizes.pop("num_key_value_heads"), sizes.pop("intermediate_size")
    return t.OPTForCausalLM(t.OPTConfig(**sizes))


def _llama(t: Any, **kw: Any) -> nn.Module:
    return t.LlamaForCausalLM(t.LlamaConfig(**_sizes(tie_word_embeddings=True) | kw))


def _gpt2(t: Any, **kw: Any) -> nn.Module:
    config = t.GPT2Config(
        vocab_size=_VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, **kw,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config)


def _qwen3(t: Any, **kw: Any) -> nn.Module:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**_sizes(head_dim=8) | kw))


def _mixtral(t: Any, **kw: Any) -> nn.Module:
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return t.MixtralForCausalLM(t.MixtralConfig(**_sizes(**extra) | kw))


def _gemma2(t: Any, **kw: Any) -> nn.Module:
    return t.Gemma2ForCausalLM(t.Gemma2Config(**_sizes(head_dim=8, sliding_window=8) | kw))


def _mistral(t: Any, **kw: Any) -> nn.Module:
    return t.MistralForCausalLM(t.MistralConfig(**_sizes(sliding_window=8) | kw))


def _gemma3(t: Any, **kw: Any) -> nn.Module:
    sizes = _sizes(head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sizes | kw))


def _cohere2(t: Any, **kw: Any) -> nn.Module:
    return t.Cohere2ForCausalLM(t.Cohere2Config(**_sizes(sliding_window=8, logit_scale=0.3) | kw))


def _gpt_oss(t: Any, **kw: Any) -> nn.Module:
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 8}
    return t.GptOssForCausalLM(t.GptOssConfig(**_sizes(**extra) | kw))


def _qwen3_moe(t: Any, **kw: Any) -> nn.Module:
    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_sizes(**extra) | kw))


def _phi3(t: Any, **kw: Any) -> nn.Module:
    return t.Phi3ForCausalLM(t.Phi3Config(**_sizes() | kw))


def _olmo2(t: Any, **kw: Any) -> nn.Module:
    return t.Olmo2ForCausalLM(t.Olmo2Config(**_sizes() | kw))


def _granite(t: Any, **kw: Any) -> nn.Module:
    scales = {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}
    return t.GraniteForCausalLM(t.GraniteConfig(**_sizes(**scales) | kw))


def _gpt_neox(t: Any, **kw: Any) -> nn.Module:
    sizes = _sizes()
    sizes.pop("num_key_value_heads")
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes | kw))


def _mamba(t: Any, **kw: Any) -> nn.Module:
    config = t.MambaConfig(
        vocab_size=_VOCAB, hidden_size=32, state_size=4, num_hidden_layers=4, conv_kernel=2,
        expand=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **kw,
    )  # fmt: skip
    return t.MambaForCausalLM(config)


def _bert(t: Any, **kw: Any) -> nn.Module:
    sizes = _sizes(num_labels=3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1) | kw
    sizes.pop("num_key_value_heads")
    return t.BertForSequenceClassification(t.BertConfig(**sizes))


def _t5(t: Any, **kw: Any) -> nn.Module:
    config = t.T5Config(
        vocab_size=_VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3,
        num_heads=4, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, **kw,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "opt": _opt,
    "llama": _llama,
    "gpt2": _gpt2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "gemma2": _gemma2,
    "mamba": _mamba,
    "bert": _bert,
    "t5": _t5,
}
"""Architecture name to constructor; take :func:`tiny_model`."""

DECODERS: dict[str, Callable[..., nn.Module]] = {
    "mistral": _mistral,
    "gemma3": _gemma3,
    "cohere2": _cohere2,
    "gpt_oss": _gpt_oss,
    "qwen3_moe": _qwen3_moe,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "gpt_neox": _gpt_neox,
}
"""Further decoders, whose attention differs in windows, sinks, scales or norms."""


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """Make a tiny model with random weights, in eval mode.

    Args:
        name: One of :data:`ARCHITECTURES` or :data:`DECODERS`.
        seed: Seed of the weights; torch's global random state is left as it was.
        dtype: Dtype of the parameters.
        **config: Fields that override the tiny configuration.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (ARCHITECTURES | DECODERS)[name](transformers, **config)
        with torch.no_grad():
            # Weights of different scale in every tensor, or mixed-up parameters would not show.
            for param in model.parameters():
                param.add_(torch.randn_like(param), alpha=0.05)
    return model.to(dtype).eval()


def tiny_inputs(name: str, *, batch: int = 4, length: int = 10, seed: int = 1) -> dict[str, Any]:
    """Make a batch with labels for :func:`tiny_model`, keys as the model's ``forward`` takes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _VOCAB, (batch, length), generator=generator)
    if name == "bert":
        return {"input_ids": ids, "labels": torch.randint(0, 3, (batch,), generator=generator)}
    labels = ids.clone() if name != "t5" else ids.flip(1).contiguous()
    return {"input_ids": ids, "labels": labels}
