"""Models of a given shape with random weights: they prove time and bytes, never quality."""

from __future__ import annotations

import torch


def fill(model, std=0.02):
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, std)
    return model.eval()


def opt(layers, *, hidden=5120, heads=40, dtype=torch.bfloat16, device="cuda"):
    """OPT-13B's layer shape by default; the published model has 40 layers."""
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.initialization import no_init_weights

    config = OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        dropout=0.0,
    )
    with torch.device(device), no_init_weights():
        model = OPTForCausalLM._from_config(config, dtype=dtype)
    model.tie_weights()
    return fill(model)


def smollm2_135m():
    """SmolLM2-135M's shape in float32, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return fill(LlamaForCausalLM(config))


def batch(tokens, *, device, vocab=49000, width=2048):
    """``tokens`` tokens in rows of at most ``width``, as model inputs with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        5, vocab, (max(1, tokens // width), min(tokens, width)), generator=generator
    )
    ids = ids.to(device)
    return {"input_ids": ids, "labels": ids}
