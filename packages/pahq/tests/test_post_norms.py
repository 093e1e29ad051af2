"""Models with norms behind attention and MLP, against transformers and by recursion."""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pahq import CircuitFinder, UnsupportedModelError, evaluation
from pahq.attribution import edge_scores
from pahq.metrics import Metric
from shared_kernels.testing.models import tiny_model
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import GEMMA, circuit_of, family, lively, logits, pairs

FAMILIES = ["gemma2", "olmo2"]
KV = ["grouped", "per_query_head"]


def random_circuit(graph, share, seed=0):
    full = graph.full()
    return torch.from_numpy(full & (np.random.default_rng(seed).random(full.shape) < share))


def full_and_empty(graph):
    full = torch.from_numpy(graph.full())
    return circuit_of(graph, full), circuit_of(graph, torch.zeros_like(full))


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_are_the_model_and_none_the_corrupted_run(name, kv):
    model, task = family(name), pairs(size=20)
    finder = CircuitFinder(model, kv=kv)
    circuits = full_and_empty(finder.graph)
    for circuit, ids in zip(circuits, (task.clean, task.corrupted), strict=True):
        found = finder.run(circuit, task.clean, task.corrupted)
        torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("change", [
    {"attn_logit_softcapping": None}, {"final_logit_softcapping": None},
    {"query_pre_attn_scalar": 8}, {"sliding_window": 32},
])  # fmt: skip
def test_all_that_is_gemma_2_matters_in_these_tests(change):
    model, task = family("gemma2"), pairs(size=20)
    other = lively("gemma2", **(GEMMA | change))
    same = other.state_dict()
    assert all(torch.equal(p, same[key]) for key, p in model.state_dict().items())
    moved = logits(model, task.clean) - logits(other, task.clean)
    assert float(moved.abs().max()) > 1e-4
    finder = CircuitFinder(other)
    found = finder.run(full_and_empty(finder.graph)[0], task.clean, task.corrupted)
    torch.testing.assert_close(found, logits(other, task.clean), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_senders_of_a_layer_add_up_to_what_it_writes(name):
    model, task = family(name), pairs()
    finder, written = CircuitFinder(model), {}
    graph = finder.graph
    for layer, block in enumerate(model.model.layers):
        for place in ("attention", "feedforward"):
            block.get_submodule(f"post_{place}_layernorm").register_forward_hook(
                lambda module, args, out, key=(place, layer): written.update({key: out})
            )
    logits(model, task.clean)
    run = finder.executor.plain(task.clean)
    for layer in range(graph.layers):
        first, mlp = graph.head(layer, 0), graph.mlp(layer)
        heads = run.senders[first:mlp]
        found = heads.sum(0)
        torch.testing.assert_close(found, written["attention", layer], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            run.senders[mlp], written["feedforward", layer], rtol=0, atol=1e-12
        )
        assert (heads.square().mean((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_changes_with_another_of_its_layer(name):
    finder, task = CircuitFinder(family(name)), pairs()
    graph, executor = finder.graph, finder.executor
    base = executor.plain(task.corrupted)
    present = torch.zeros(graph.senders, graph.receivers).bool()
    present[graph.edge("input->a0.h0<q>")] = True
    run = executor.run(present, task.clean, base)
    first, other = (run.senders[s] - base.senders[s] for s in (graph.head(0, 0), graph.head(0, 1)))
    assert float(first.abs().max()) > 1e-3
    assert float(other.abs().max()) > 1e-5
    if name == "gemma2":
        # by one factor for each token
        ratio = (run.senders / base.senders)[graph.head(0, 1)]
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-9, atol=0)


def literally(finder, ids, present=None, other=None):
    """What senders and receivers are, by recursion over the parts of a model of transformers.

    Absent edges carry what `other` says of their sender; by default none is absent.
    """
    model, graph = finder.model, finder.graph
    body, gemma, size = model.model, model.config.model_type == "gemma2", 8
    index = torch.arange(ids.shape[1])
    turns = [x[0] for x in body.rotary_emb(torch.zeros(1, dtype=torch.float64), index[None])]

    def receiver(number):
        total = 0
        for s in range(graph.upstream(number)):
            total = total + (sender(s) if present is None or present[s, number] else other(s))
        return total

    @functools.cache
    def sender(number):
        if number == 0:
            return body.embed_tokens(ids)
        layer, place = divmod(number - 1, graph.heads + 1)
        block = body.layers[layer]
        if place == graph.heads:
            x = receiver(graph.columns(layer, "mlp").start)
            x = block.pre_feedforward_layernorm(x) if gemma else x
            return block.post_feedforward_layernorm(block.mlp(x))
        total = sum(made(layer, head) for head in range(graph.heads))
        norm = block.post_attention_layernorm
        eps = norm.eps if gemma else norm.variance_epsilon
        rms = (total.square().mean(-1, keepdim=True) + eps).sqrt()
        return (norm.weight + gemma) * made(layer, place) / rms

    @functools.cache
    def raw(layer, part, head):
        columns = graph.columns(layer, part)
        x = receiver(columns.start + head)
        if gemma:
            x = body.layers[layer].input_layernorm(x)
        weight = getattr(body.layers[layer].self_attn, f"{part}_proj").weight
        weight = weight.view(-1, size, len(weight[0]))
        return x @ weight[head * len(weight) // (columns.stop - columns.start)].T

    @functools.cache
    def part(layer, name, head):
        columns = graph.columns(layer, name)
        count = columns.stop - columns.start
        if gemma or name == "v":
            return raw(layer, name, head)
        norm = getattr(body.layers[layer].self_attn, f"{name}_norm")
        every = torch.cat([raw(layer, name, j) for j in range(count)], -1)
        weight = norm.weight.view(-1, size)
        weight = weight.repeat_interleave(count // len(weight), 0).flatten()
        rms = (every.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return (every / rms * weight)[..., size * head : size * (head + 1)]

    @functools.cache
    def made(layer, head):
        attention = body.layers[layer].self_attn
        key = head // graph.group
        q, k = apply_rotary_pos_emb(part(layer, "q", head), part(layer, "k", key), *turns, 0)
        scores = q @ k.transpose(-1, -2) * (2 if gemma else size) ** -0.5
        scores = 0.5 * (scores / 0.5).tanh() if gemma else scores
        behind = index[:, None] - index
        window = 8 if gemma and layer == 0 else 1000
        scores = scores.masked_fill((behind < 0) | (behind >= window), float("-inf"))
        weight = attention.o_proj.weight[:, size * head : size * (head + 1)]
        return scores.softmax(-1) @ part(layer, "v", key) @ weight.T

    return sender, receiver


@pytest.mark.parametrize("ablation", ["patch", "zero"])
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", FAMILIES)
def test_circuits_are_what_recursion_says(name, kv, ablation):
    finder, task = CircuitFinder(family(name), kv=kv), pairs(n=2, size=12)
    with torch.no_grad():
        plain, _ = literally(finder, task.corrupted)
        other = plain if ablation == "patch" else lambda s: torch.zeros_like(plain(0))
        for share in (0.2, 0.5, 0.8):
            present = random_circuit(finder.graph, share)
            _, receiver = literally(finder, task.clean, present, other)
            wanted = finder.adapter.logits(receiver(finder.graph.logits))
            found = finder.run(
                circuit_of(finder.graph, present), task.clean, task.corrupted, ablation=ablation
            )
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_grouped_edges_are_those_of_all_heads_of_the_group(name):
    model, task = family(name), pairs()
    grouped, apart = CircuitFinder(model), CircuitFinder(model, kv="per_query_head")
    present = random_circuit(grouped.graph, 0.5)
    wide = torch.zeros(apart.graph.senders, apart.graph.receivers).bool()
    for receiver in range(apart.graph.receivers):
        layer, part, index = apart.graph.place(receiver)
        source = grouped.graph.logits
        if part != "logits":
            index = index // grouped.graph.group if part in "kv" else index
            source = grouped.graph.columns(layer, part).start + index
        wide[:, receiver] = present[:, source]
    found = [
        finder.run(circuit_of(finder.graph, p), task.clean, task.corrupted)
        for finder, p in ((grouped, present), (apart, wide))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", FAMILIES)
def test_eap_is_the_derivative_by_a_factor_on_the_edge(name, kv):
    finder, task = CircuitFinder(family(name), kv=kv), pairs()
    executor = finder.executor
    clean, corrupted = (executor.plain(ids) for ids in (task.clean, task.corrupted))
    metric = Metric("logit_diff", finder.adapter, task, clean.final)
    found = edge_scores(executor, clean, corrupted, metric)
    torch.testing.assert_close(finder.eap(task).scores, found.float(), rtol=1e-5, atol=1e-9)
    full = torch.from_numpy(finder.graph.full())
    factors = full.double().requires_grad_()
    state = type(executor).run.__wrapped__(executor, factors, task.clean, corrupted)
    (slopes,) = torch.autograd.grad(metric(state.final[None]).sum(), factors)
    torch.testing.assert_close(found[full], -slopes[full], rtol=0, atol=1e-11)
    assert (found[~full] == 0).all()
    assert float(found.abs().max()) > 1e-3
    for edge in full.nonzero()[:: len(full.nonzero()) // 8].tolist():
        values = []
        for factor in (1 - 1e-5, 1 + 1e-5):
            weights = full.double()
            weights[tuple(edge)] = factor
            run = executor.run(weights, task.clean, corrupted)
            values.append(float(metric(run.final[None]).detach()[0]))
        slope = (values[0] - values[1]) / 2e-5
        assert float(found[tuple(edge)]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("ablation", ["patch", "zero", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation(name, ablation):
    finder, task = CircuitFinder(family(name)), pairs()
    everything, nothing = (
        finder.evaluate(circuit, task, ("kl", "logit_diff", "nll"), ablation=ablation)
        for circuit in full_and_empty(finder.graph)
    )
    for metric in everything:
        assert everything[metric]["recovered"] == pytest.approx(1)
        assert nothing[metric]["recovered"] == pytest.approx(0, abs=1e-9)
    assert everything["kl"]["all"] == pytest.approx(0, abs=1e-12)
    if ablation == "patch":
        p, q = (
            logits(finder.model, ids)[torch.arange(3), task.positions].log_softmax(-1)
            for ids in (task.clean, task.corrupted)
        )
        wanted = float((p.exp() * (p - q)).sum(-1).mean())
        assert nothing["kl"]["circuit"] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_edges_are_better_than_chance(name):
    finder, task = CircuitFinder(family(name)), pairs()
    best = finder.eap(task, metric="kl", ig_steps=8).top(finder.graph.edges // 2)
    report = evaluation.faithfulness(finder, best, task, random_circuits=4, progress=False)
    assert report.task.circuit.kl < min(score.kl for score in report.task.random)
    assert report.task.circuit.kl < report.task.complement.kl


@pytest.mark.parametrize("name", FAMILIES)
def test_models_as_transformers_have_them(name):
    """In float32 with its own norms and attention, and with weights of 16 bits."""
    torch.manual_seed(0)
    model, task = tiny_model(name, num_hidden_layers=2).eval(), pairs(size=20)
    finder = CircuitFinder(model)
    found = finder.run(full_and_empty(finder.graph)[0], task.clean, task.corrupted)
    torch.testing.assert_close(found, logits(model, task.clean), rtol=0, atol=1e-5)
    rough = CircuitFinder(copy.deepcopy(model).bfloat16())
    wide = CircuitFinder(copy.deepcopy(rough.model).float())
    circuit = circuit_of(finder.graph, random_circuit(finder.graph, 0.5))
    found = [f.run(circuit, task.clean, task.corrupted) for f in (rough, wide)]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_differences_are_refused(name):
    finder, task = CircuitFinder(family(name)), pairs()
    with pytest.raises(UnsupportedModelError, match=r"expected fp32 .* got 'bf16-delta'"):
        finder.acdc(task, 0.1, precision="bf16-delta")


@pytest.mark.parametrize("name", FAMILIES)
def test_bad_input(name):
    with pytest.raises(UnsupportedModelError, match=r"has a bias.* attention_bias=False"):
        CircuitFinder(tiny_model(name, attention_bias=True).eval())
    adapter = CircuitFinder(family(name)).adapter
    for heads in ([1], [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 0]):
        z = torch.zeros(len(heads), 1, 3, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"heads: expected all 4 .* got list \["):
            adapter.write(0, heads, z)
    adapter.write(0, [3, 1, 0, 2], torch.zeros(4, 1, 3, 8, dtype=torch.float64))


def test_queries_and_keys_of_some_heads_are_refused():
    adapter = CircuitFinder(family("olmo2")).adapter
    for part, heads in (
        ("q", [1]), ("q", []), ("q", [0, 1, 2, 2]), ("k", [0]), ("k", [0, 0, 1]), ("k", [0, 1, 1]),
    ):  # fmt: skip
        x = torch.zeros(len(heads), 1, 3, 32, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"heads: expected all \d heads, as often"):
            adapter.part(0, part, heads, x)
    x = torch.ones(1, 1, 3, 32, dtype=torch.float64)
    assert adapter.part(0, "v", [1], x).shape == (1, 1, 3, 8)
    with pytest.raises(NotImplementedError, match="over all heads of a layer"):
        adapter.head_norm(0, "q", x)
