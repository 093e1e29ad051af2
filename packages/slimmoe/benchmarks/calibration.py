"""Calibration beside a plain forward pass, and an observer that runs all experts on all tokens.

Layers of Qwen3-MoE with random weights: they prove time, and nothing of a model. What all experts
give for all tokens is what hooks on a mixture's output need to weigh experts by, as in REAP
(arXiv:2510.13999); here it is written anew, in one line of products for each expert.
"""

import torch
from shared_kernels.bench import Arm, Workload, benchmark


def sizes(device):
    """Of a layer: those of Qwen3-30B-A3B on a GPU."""
    if device == "cuda":
        return {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}  # fmt: skip
    return {"num_experts": 64, "hidden_size": 256, "moe_intermediate_size": 128,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip


def all_experts(model, ids):
    """Run a model, with every expert on every token, and return weighted norms by expert."""
    sums = []

    def hook(experts, args, _output):
        x, index, weights = args
        given = x.new_empty(len(x), experts.num_experts)
        for e in range(experts.num_experts):
            gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[e]).chunk(2, -1)
            out = torch.nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[e])
            given[:, e] = out.norm(dim=-1)
        chosen = torch.zeros_like(given).scatter_(1, index, weights.to(given.dtype))
        sums.append((given * chosen).sum(0).double())

    hooks = [layer.mlp.experts.register_forward_hook(hook) for layer in model.model.layers]
    try:
        with torch.no_grad():
            model.model(ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return sums


@benchmark
def calibration(device):
    """Four layers, eight experts of each token, 16,384 tokens at a time."""
    from slimmoe.calibration import calibrate
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=1024, num_hidden_layers=4, num_experts_per_tok=8, norm_topk_prob=True,
        max_position_embeddings=4096, **sizes(device),
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(dtype).eval()
        ids = torch.randint(1024, (32, 2048) if device == "cuda" else (4, 1024))
    batches = ids.split(16384 // ids.shape[1])
    model.set_experts_implementation("grouped_mm")

    @torch.no_grad()
    def plain():
        for batch in batches:
            model.model(batch, use_cache=False)

    def ours():
        return calibrate(model, ids, batch_tokens=16384, progress=False)

    def every():
        parts = [all_experts(model, batch) for batch in batches]
        return [sum(layer) for layer in zip(*parts, strict=True)]

    def check():
        theirs, found = every(), ours()
        for layer, sums in enumerate(theirs):
            wanted = found.experts[layer].weighted_norm_sum
            most = 1e-5 if device == "cpu" else 2e-2
            torch.testing.assert_close(sums.cpu(), wanted, rtol=most, atol=most)

    yield Workload(
        name="calibration/qwen3-moe", device=device, check=check, baseline="plain", clock="wall",
        params={"layers": 4, "tokens": ids.numel(), "per token": 8, "dtype": str(dtype)[6:],
                "weights": "random", **sizes(device)},
        arms=[Arm(name="plain", fn=plain), Arm(name="calibrate", fn=ours),
              Arm(name="all experts", fn=every)],
    )  # fmt: skip
