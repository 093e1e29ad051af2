"""Small models whose parts matter, and pairs of inputs."""

import types

import numpy as np
import pytest
import torch
from pahq import Circuit, Task
from pahq.ablation import ablated
from pahq.metrics import Metric
from shared_kernels.testing.models import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

#: So that caps and scale matter to a small model.
GEMMA = {
    "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.2, "query_pre_attn_scalar": 2,
}  # fmt: skip


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


def family(name):
    """A lively model of any family, in which caps change something."""
    return lively(name, **(GEMMA if name == "gemma2" else {}))


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


def readers_of(finder, receiver):
    """Senders that change with what a receiver reads."""
    graph = finder.graph
    layer, part, _ = graph.place(receiver)
    if finder.adapter.shared_scale and part in ("q", "k", "v"):
        return [graph.head(layer, head) for head in range(graph.heads)]
    return graph.readers(receiver)


def sequential(finder, task, threshold, direct=False, ablation="patch", order="acdc", seed=0):
    """ACDC of spec and paper, one whole run for each edge; returns edges, value, effects."""
    graph, executor = finder.graph, finder.executor
    base = ablated(executor, executor.plain(task.corrupted), ablation, task.positions)
    measure = Metric("kl", finder.adapter, task, executor.plain(task.clean).final)
    value = lambda present: float(measure(executor.run(present, task.clean, base).final[None])[0])  # noqa: E731
    present = torch.from_numpy(graph.full())
    now, effects, groups = value(present), {}, {}

    def alive(receiver):
        reached = set(present[:, graph.logits].nonzero()[:, 0].tolist())
        for r in reversed(range(receiver + 1, graph.logits)):
            if reached & set(readers_of(finder, r)):
                reached |= set(present[:, r].nonzero()[:, 0].tolist())
        return receiver == graph.logits or bool(reached & set(readers_of(finder, receiver)))

    receivers = list(graph.order())
    for receiver in receivers:
        layer, part, index = graph.place(receiver)
        if direct and part == "v" and index == graph.key_heads - 1:
            for kind in "vkq":
                columns = graph.columns(layer, kind)
                for r in reversed(range(columns.start, columns.stop)):
                    if not alive(r):
                        continue
                    before = present[:, r].clone()
                    present[:, r] = False
                    after = value(present)
                    groups[r] = after - now
                    if after - now < threshold:
                        now = after
                    else:
                        present[:, r] = before
        candidates = graph.candidates(receiver)
        if order == "reverse":
            candidates = candidates[::-1]
        elif order == "shuffle":
            draws = np.random.default_rng([seed, receiver])
            candidates = [candidates[i] for i in draws.permutation(len(candidates))]
        if not alive(receiver):
            present[:, receiver] = False
            continue
        for sender in candidates:
            if not present[sender, receiver]:
                continue
            present[sender, receiver] = False
            after = value(present)
            effects[sender, receiver] = after - now
            if after - now < threshold:
                now = after
            else:
                present[sender, receiver] = True
    return present, now, effects, groups


def compare(found, wanted, graph):
    present, value, effects, groups = wanted
    assert torch.equal(found.present, present)
    assert found.provenance["value"] == pytest.approx(value, abs=1e-11)
    tried = {tuple(e) for e in (~found.scores.isnan()).nonzero().tolist()}
    assert tried == set(effects)
    for edge, effect in effects.items():
        assert float(found.scores[edge]) == pytest.approx(effect, rel=1e-5, abs=1e-11)
    told = {graph.receiver_names[r]: effect for r, effect in groups.items()}
    assert found.provenance["direct_effects"] == pytest.approx(told, rel=1e-5, abs=1e-11)
