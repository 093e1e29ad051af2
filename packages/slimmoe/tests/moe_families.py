"""Tiny models of every family, with random weights of which each tensor matters."""

import torch
import transformers

#: Sizes that are equal on purpose, so that an axis cannot be told by its size.
SAME = {
    "hidden_size": 16, "moe_intermediate_size": 16, "num_experts": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 16, "num_hidden_layers": 4,
}  # fmt: skip
_COMMON = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_MLA = {
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}  # fmt: skip

#: By name: class of the configuration, its fields, and what it calls experts and their width.
_FAMILIES = {
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "intermediate_size": 40,
                                     "norm_topk_prob": True}, {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"intermediate_size": 40,
                                     "shared_expert_intermediate_size": 20}, {}),
    "qwen3_next": ("Qwen3NextConfig", {"head_dim": 16, "intermediate_size": 40,
                                       "shared_expert_intermediate_size": 20, **_LINEAR}, {}),
    "mixtral": ("MixtralConfig", {}, {"num_experts": "num_local_experts",
                                      "moe_intermediate_size": "intermediate_size"}),
    "olmoe": ("OlmoeConfig", {}, {"moe_intermediate_size": "intermediate_size"}),
    "deepseek_v2": ("DeepseekV2Config", {"q_lora_rank": None, "topk_method": "greedy",
                                         "intermediate_size": 40, **_MLA},
                    {"num_experts": "n_routed_experts"}),
    "deepseek_v3": ("DeepseekV3Config", {"q_lora_rank": 20, "intermediate_size": 40, **_MLA},
                    {"num_experts": "n_routed_experts"}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "sliding_window": 8},
                {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def config(family, **changes):
    """A configuration; changes have the names of Qwen3-MoE."""
    kind, fields, names = _FAMILIES[family]
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24} | changes
    sizes = {names.get(key, key): value for key, value in sizes.items()}
    return getattr(transformers, kind)(**(_COMMON | fields | sizes))


def model(family, seed=0, dtype=torch.float32, **changes):
    """A model in eval mode whose weights, norms and biases are all drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = transformers.AutoModelForCausalLM.from_config(config(family, **changes))
        with torch.no_grad():
            for name, tensor in made.state_dict().items():
                if not tensor.is_floating_point():
                    continue
                if tensor.ndim == 1 or name.endswith("_bias"):
                    tensor += 0.1 * torch.randn_like(tensor)
                elif "embed" in name:
                    tensor.normal_()
                else:
                    # as wide as what goes in, so that no part drowns another
                    tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return made.to(dtype).eval()


def tokens(family_or_model, n=3, size=12, seed=0):
    """Random token ids."""
    at = family_or_model.config if hasattr(family_or_model, "config") else config(family_or_model)
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(3, at.vocab_size, (n, size), generator=draws)
