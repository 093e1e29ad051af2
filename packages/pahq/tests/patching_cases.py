"""Small models whose parts matter, and pairs of inputs."""

import types

import torch
from pahq import Circuit, Task
from shared_kernels.testing.models import tiny_model


def lively(name, layers=2):
    """A model whose heads and MLPs matter, in float64."""
    torch.manual_seed(0)
    model = tiny_model(name) if name == "gpt2" else tiny_model(name, num_hidden_layers=layers)
    if name == "gpt2":
        model.transformer.h = model.transformer.h[:layers]
        model.config.n_layer = layers
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "emb" not in key and "wte" not in key and "wpe" not in key:
                p.mul_(4)
    return exact(model.double().eval())


def exact(model):
    """A model in float64 whose RMS norms are, too: those of transformers round to float32."""

    def forward(norm, x):
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


def pairs(n=3, size=12, seed=0):
    draws = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(3, 96, (2, n, size), generator=draws)
    positions = torch.randint(size // 2, size, (n,), generator=draws)
    return Task(clean, corrupted, positions, torch.arange(5, 5 + n), torch.arange(20, 20 + n))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def circuit_of(graph, present):
    return Circuit(graph, present, torch.full(present.shape, float("nan")))
