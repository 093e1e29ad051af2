"""Small models whose parts matter, and pairs of inputs."""

import types

import torch
from pahq import Circuit, Task
from shared_kernels.testing.models import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def lively(name, layers=2, **sizes):
    """A model whose heads and MLPs matter, in float64."""
    torch.manual_seed(0)
    sizes |= {} if name == "gpt2" else {"num_hidden_layers": layers}
    model = tiny_model(name, **sizes)
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
    """A model in float64 whose RMS norms and softmax are, too: transformers' round to float32."""

    def forward(norm, x):
        # Gemma's has eps under another name, and weights that are held less 1
        gemma = hasattr(norm, "eps")
        eps = norm.eps if gemma else norm.variance_epsilon
        return (norm.weight + gemma) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    if hasattr(model.config, "attn_logit_softcapping"):
        AttentionInterface.register("exact", attend)
        AttentionMaskInterface.register("exact", eager_mask)
        model.config._attn_implementation = "exact"
    return model


def attend(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    """The eager attention of transformers, whose softmax is in float32."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = (scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


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
