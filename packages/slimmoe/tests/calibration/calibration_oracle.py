"""Statistics by brute force, from the formulas: every expert on every token, each token alone."""

import moe_families
import torch
from torch.nn.functional import linear, silu


def exact_model(family, **changes):
    """A float64 model with the experts' own eager code."""
    if family.startswith("deepseek"):
        # latent attention has as many key heads, and rotates its own part of a head
        changes = changes | {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 8}
    made = moe_families.model(family, dtype=torch.float64, **changes)
    made.set_experts_implementation("eager")
    return made


def routing(family, config, router, x):
    """Logits ``[T, E]`` and the weights ``[T, E]`` that outputs are multiplied by, else zero."""
    k = config.num_experts_per_tok
    if family.startswith("deepseek"):
        logits = linear(x.float(), router.weight.float())
    else:
        logits = linear(x, router.weight, router.bias if family == "gpt_oss" else None)
    if family == "gpt_oss":
        chosen = logits.topk(k).indices
        weights = logits.gather(1, chosen).softmax(-1)
    elif family == "deepseek_v3":
        scores = logits.sigmoid()
        choice = scores + router.e_score_correction_bias
        groups = choice.view(len(x), config.n_group, -1)
        best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        choice = groups.masked_fill(~allowed[..., None], -torch.inf).view(len(x), -1)
        chosen = choice.topk(k).indices
        weights = scores.gather(1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * config.routed_scaling_factor
    else:
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(k)
        if family == "mixtral" or getattr(config, "norm_topk_prob", False):
            weights = weights / weights.sum(-1, keepdim=True)
        if family == "deepseek_v2":
            weights = weights * config.routed_scaling_factor
    dense = torch.zeros(len(x), logits.shape[1], dtype=torch.float64)
    selected = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, chosen, True)
    return logits, dense.scatter_(1, chosen, weights.double()), selected


def expert(family, experts, e, x):
    """What expert e's down projection is applied to, and its output, on all tokens."""
    if family == "gpt_oss":
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        a = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return a, a @ experts.down_proj[e] + experts.down_proj_bias[e]
    gate, up = linear(x, experts.gate_up_proj[e]).chunk(2, -1)
    a = silu(gate) * up
    return a, linear(a, experts.down_proj[e])


def moe_sums(family, config, router, experts, x, counted):
    """The sums of `ExpertStatistics` over the counted tokens, and Σ w y of all tokens."""
    logits, weights, selected = routing(family, config, router, x)
    size = weights.shape[1]
    made = [expert(family, experts, e, x) for e in range(size)]
    total = sum(weights[:, e, None] * y for e, (_, y) in enumerate(made))
    sums = {
        "count": torch.zeros(size), "weight_sum": torch.zeros(size),
        "share_sum": torch.zeros(size), "norm_sum": torch.zeros(size),
        "weighted_norm_sum": torch.zeros(size), "norm_max": torch.zeros(size),
        "output_sum": torch.zeros(size, x.shape[1]),
        "activation_sum": torch.zeros(size, made[0][0].shape[1]),
        "logit_gram": torch.zeros(size, size), "probability_sum": torch.zeros(size),
    }  # fmt: skip
    sums = {name: value.double() for name, value in sums.items()}
    for t in torch.nonzero(counted).flatten().tolist():
        z = logits[t].double()
        sums["logit_gram"] += torch.outer(z, z)
        sums["probability_sum"] += logits[t].softmax(-1)
        for e in torch.nonzero(selected[t]).flatten().tolist():
            a, y, w = made[e][0][t], made[e][1][t], weights[t, e]
            norm = y.square().sum().sqrt()
            sums["count"][e] += 1
            sums["weight_sum"][e] += w
            sums["share_sum"][e] += w / weights[t].sum()
            sums["norm_sum"][e] += norm
            sums["weighted_norm_sum"][e] += w * norm
            sums["norm_max"][e] = max(sums["norm_max"][e], norm)
            sums["output_sum"][e] += y
            sums["activation_sum"][e] += a.abs()
    return sums, total


def brute_force(family, model, sequences, counted=None):
    """All sums by the names that `CalibrationStatistics.parts` gives them.

    Args:
        family: Of the model.
        model: In float64, eager.
        sequences: Token ids, without padding; each is run by itself.
        counted: Which tokens of each count.
    """
    base, found = model.model, {}
    seen = {}

    def watch(name, module):
        def hook(_module, args, output):
            x = args[0] if args else None
            seen[name] = (x, output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(hook)

    def add(name, **values):
        part = found.setdefault(name, dict.fromkeys(values, 0))
        for key, value in values.items():
            new = torch.maximum if key == "norm_max" and torch.is_tensor(part[key]) else torch.add
            part[key] = new(torch.as_tensor(part[key], dtype=torch.float64), value)

    norms = {"model.norm": base.norm}
    handles = [watch("embedding", base.embed_tokens)]
    for i, layer in enumerate(base.layers):
        norms[f"model.layers.{i}.input_layernorm"] = layer.input_layernorm
        norms[f"model.layers.{i}.post_attention_layernorm"] = layer.post_attention_layernorm
        handles.append(watch(f"layers.{i}", layer))
        if hasattr(layer.mlp, "experts"):
            handles.append(watch(f"experts.{i}", layer.mlp.experts))
    handles += [watch(f"norms.{name}", norm) for name, norm in norms.items()]
    for at, ids in enumerate(sequences):
        mask = torch.ones(len(ids), dtype=torch.bool) if counted is None else counted[at]
        with torch.no_grad():
            base(ids[None], use_cache=False)
            for name, (x, output) in seen.items():
                kind, _, key = name.partition(".")
                rows = output.flatten(0, -2)[mask]
                if kind == "norms":
                    square = x.flatten(0, -2)[mask].square().sum(0)
                    add(name, output_abs_sum=rows.abs().sum(0), input_square_sum=square)
                elif kind == "experts":
                    block = base.layers[int(key)].mlp
                    router = block.router if family == "gpt_oss" else block.gate
                    sums, total = moe_sums(family, model.config, router, block.experts, x, mask)
                    # the formulas above are the model's
                    torch.testing.assert_close(total, output, rtol=1e-12, atol=1e-12)
                    add(name, **sums)
                else:
                    add(name, output_sum=rows.sum(0))
    for handle in handles:
        handle.remove()
    return found


def assert_same(statistics, wanted, rtol=0.0, atol=0.0):
    """Compare with sums by name, or with other statistics."""
    if not isinstance(wanted, dict):
        wanted = {name: part.tensors() for name, part in wanted.parts()}
    found = {name: part.tensors() for name, part in statistics.parts()}
    assert set(found) == set(wanted)
    for name, part in found.items():
        for key, value in part.items():
            expected = wanted[name][key]
            assert value.dtype == torch.float64
            # of the largest entry: sums of signed terms may cancel
            bound = atol + rtol * expected.abs().max()
            error = (value - expected).abs().max()
            assert error <= bound, f"{name}.{key}: {error} > {bound}"
