"""A teacher whose layers stay in the host's memory beside one that is on the GPU.

Layers of Qwen3-30B-A3B with random weights, which prove time and bytes, and nothing of a model. A
layer's weights are copied while the one before it runs: with enough tokens in a pass, the copy
costs no time. Without a GPU there is nothing to copy, and a small teacher shows what the hooks
cost.
"""

import torch
from shared_kernels.bench import Arm, Workload, benchmark

LAYERS = 6


def model_of(device):
    """Return a teacher, in the host's memory, and the tokens of a row."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if device == "cuda":
        sizes = {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768,
                 "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}  # fmt: skip
    else:
        sizes = {"num_experts": 64, "hidden_size": 256, "moe_intermediate_size": 128,
                 "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
    config = Qwen3MoeConfig(
        vocab_size=1024, num_hidden_layers=LAYERS, num_experts_per_tok=8, norm_topk_prob=True,
        max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16 if device == "cuda" else None)
    model.set_experts_implementation("grouped_mm")
    return model.cpu()


@benchmark
def teacher(device):
    """A pass over 16,384 tokens, and over 65,536 and 131,072."""
    from slimmoe.distillation import Teacher

    streamed = Teacher(model_of(device), offload=True, device=device)
    resident = Teacher(model_of(device), device=device)
    size = sum(p.nbytes for layer in resident.model.model.layers for p in layer.parameters())
    copied = size if device == "cuda" else 0
    for rows in (8, 32, 64) if device == "cuda" else (2,):
        ids = torch.randint(1024, (rows, 2048 if device == "cuda" else 512), device=device)
        ways = {
            name: lambda made=made, ids=ids: made({"input_ids": ids})
            for name, made in (("resident", resident), ("streamed", streamed))
        }

        def check(ways=ways):
            found = [run() for run in ways.values()]
            return torch.equal(*found)

        yield Workload(
            name=f"teacher/{ids.numel()} tokens", device=device, check=check, baseline="resident",
            clock="wall",
            params={"layers": LAYERS, "bytes of layers": size, "tokens": ids.numel(),
                    "weights": "random", "model": "Qwen3-MoE"},
            arms=[Arm(name="resident", fn=ways["resident"]),
                  Arm(name="streamed", fn=ways["streamed"], h2d_bytes=copied)],
        )  # fmt: skip
