"""Models of a given shape with random weights: they prove time and bytes, never quality."""

from __future__ import annotations

import torch

#: hidden, intermediate, heads, key-value heads, layers, vocabulary, whether the head is tied.
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3, 30, 49152, True),
    "llama-1b": (2048, 8192, 32, 8, 16, 128256, True),
    "llama-8b": (4096, 14336, 32, 8, 32, 128256, False),
}


def llama(name, *, layers=None, tied=None, dtype=torch.float32, device="cpu"):
    """A Llama of a published shape, perhaps with fewer layers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    hidden, intermediate, heads, kv_heads, published, vocabulary, ties = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or published,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=ties if tied is None else tied,
        use_cache=False,
    )
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0) if param.ndim == 1 else param.normal_(0, 0.02)
    return model.train()


def batches(rows, tokens, count, *, vocabulary, device):
    """``count`` physical batches of ``rows`` units of ``tokens`` random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (count, rows, tokens), generator=generator).to(device)
    return [{"input_ids": x, "labels": x} for x in ids]
