"""Compiled programs: that the models are tracr's, and that searches find their circuits."""

import copy
import dataclasses
import itertools
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from pahq import Circuit, CircuitFinder, Task
from pahq.ablation import ablated
from pahq.adapters import adapter_of
from pahq.evaluation import auc_roc
from pahq.truth import tracr

F64 = torch.float64
THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)
#: By program: the edges that matter, and those that weights have and that do not.
EDGES = {
    "reverse": ([
        # how often BOS is seen is one over the length
        "input->a0.h0<v>", "a0.h0->m0", "input->m0",
        # length - index, and that less 1
        "m0->m1", "input->m1", "m1->m2",
        # a query asks for that index, a key has its own, and a value its token
        "m2->a3.h0<q>", "input->a3.h0<k>", "input->a3.h0<v>", "a3.h0->logits",
    ], ["input->a0.h0<q>", "input->a0.h0<k>", "input->a3.h0<q>"]),
    "proportion": ([
        "input->m0", "input->a1.h0<q>", "input->a1.h0<k>", "m0->a1.h0<v>", "a1.h0->logits",
    ], []),
    "sort": ([
        # keys that are no two alike, of which those are counted that are smaller
        "input->m0", "m0->a1.h0<q>", "m0->a1.h0<k>", "input->a1.h0<q>", "input->a1.h0<k>",
        "input->a1.h0<v>", "a1.h0->m1", "input->m1",
        # a query asks for its index, a key has the count
        "input->a2.h0<q>", "m1->a2.h0<k>", "input->a2.h0<v>", "a2.h0->logits",
    ], ["input->a2.h0<k>"]),
    "balance": ([
        "input->m0", "input->a1.h0<q>", "input->a1.h0<k>", "m0->a1.h0<v>", "a1.h0->m1",
        "input->a1.h1<q>", "input->a1.h1<k>", "m0->a1.h1<v>", "a1.h1->m1", "m1->logits",
    ], []),
    "so far": ([
        "input->m0", "input->a1.h0<q>", "input->a1.h0<k>", "m0->a1.h0<v>", "a1.h0->logits",
    ], []),
}  # fmt: skip
NAMES = [*EDGES]


def share(values, one):
    return [values[: i + 1].count(one) / (i + 1) for i in range(len(values))]


#: What the programs say they do.
DOES = {
    "reverse": lambda x: x[::-1],
    "proportion": lambda x: share(x, "x"),
    "sort": sorted,
    "balance": lambda x: [a - b for a, b in zip(share(x, "("), share(x, ")"), strict=True)],
    "so far": lambda x: share(x, "x"),
}


@pytest.fixture(scope="session")
def compiled():
    """By name, what tracr compiled and the program that was made of it."""
    compiling = pytest.importorskip("tracr.compiler.compiling")
    lib = pytest.importorskip("tracr.compiler.lib")
    rasp = pytest.importorskip("tracr.rasp.rasp")
    own, seen = compiling.compile_rasp_to_model, []

    def watched(*args, **options):
        seen.append(own(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compile_rasp_to_model", watched)
        found = {name: getattr(tracr, name)() for name in NAMES[:3]}
    balance = own(lib.make_pair_balance(rasp.tokens, "(", ")"), vocab={*"()a"}, max_seq_len=4)
    part = own(lib.make_frac_prevs(rasp.tokens == "x"), vocab={*"xy"}, max_seq_len=4, causal=True)
    seen += [balance, part]
    found |= {"balance": tracr.program(balance), "so far": tracr.program(part)}
    return {name: (theirs, found[name]) for name, theirs in zip(NAMES, seen, strict=True)}


def inputs(made, length):
    return [[*x] for x in itertools.product(made.tokens, repeat=length)]


def every(made):
    """Ids of all inputs, by lengths."""
    for length in range(1, made.model.config.max_position_embeddings):
        values = inputs(made, length)
        yield values, made.encode(values)


def circuit_of(graph, present):
    return Circuit(graph, present, torch.full(present.shape, float("nan")))


def whole(graph):
    return circuit_of(graph, torch.from_numpy(graph.full()))


def spelled(model, ids, present, base):
    """Logits of a circuit, edge by edge, from the modules alone.

    What absent edges carry is ``base``, by sender.
    """
    config, outs = model.config, {"input": model.embed(ids)}
    biases = [torch.zeros_like(outs["input"])]

    def read(receiver):
        return sum(outs[s] if f"{s}->{receiver}" in present else base[s] for s in outs) + sum(
            biases
        )

    for layer, block in enumerate(model.blocks):
        heads = {}
        for h in range(config.heads):
            some = slice(h * config.head_dim, (h + 1) * config.head_dim)
            name = f"a{layer}.h{h}"
            q, k, v = (block.parts[p](read(f"{name}<{p}>"))[..., some] for p in "qkv")
            scores = q @ k.mT / config.head_dim**0.5
            if config.causal:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            heads[name] = scores.softmax(-1) @ v @ block.output.weight[:, some].T
        outs |= heads
        biases.append(block.output.bias.expand_as(biases[0]))
        outs[f"m{layer}"] = block.outer(block.inner(read(f"m{layer}")).relu())
    return model.unembed(read("logits")), outs


@torch.no_grad()
def without(model, ids, names, removed, ablation="zero", other=None):
    """Logits without some edges, of all that have names."""
    if ablation == "zero":
        base = defaultdict(lambda: torch.zeros(()))
    else:
        base = spelled(model, other, names, {})[1]
    return spelled(model, ids, names - removed, base)[0]


# --- models of random weights: nothing of them is tracr's but the shape ---------------------------


def lively(causal=False, heads=2, seed=0):
    torch.manual_seed(seed)
    model = tracr.TracrModel(tracr.TracrConfig(
        layers=2, heads=heads, head_dim=4, hidden_size=12, inner=7, vocabulary=9,
        max_position_embeddings=9, outputs=5, causal=causal,
    )).double().eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim == 2 else 0.2))
    return model


def pairs(n=5, size=7, seed=0):
    """Answers in the middle, at the beginning and at the end."""
    draws = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(9, (2, n, size), generator=draws)
    positions = torch.tensor([0, 3, size - 1, 1, 2])[:n]
    return Task(clean, corrupted, positions, torch.arange(n) % 5, (torch.arange(n) + 1) % 5)


@pytest.mark.parametrize("causal", [False, True])
def test_all_edges_are_the_model_and_none_is_the_corrupted_run(causal):
    model, task = lively(causal), pairs()
    finder = CircuitFinder(model)
    assert finder.adapter.causal == causal
    full = whole(finder.graph)
    none = circuit_of(finder.graph, torch.zeros_like(full.present))
    with torch.no_grad():
        for circuit, ids in ((full, task.clean), (none, task.corrupted)):
            found = finder.run(circuit, task.clean, task.corrupted)
            torch.testing.assert_close(found, model(ids).logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_zero_ablation_of_all_is_that_by_hooks():
    model, task = lively(), pairs()
    finder = CircuitFinder(model)
    none = circuit_of(finder.graph, torch.zeros_like(whole(finder.graph).present))
    found = finder.run(none, task.clean, task.corrupted, ablation="zero")
    hooks = [model.tokens, model.positions, *(block.outer for block in model.blocks)]
    # biases of what heads write belong to no sender
    handles = [m.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out)) for m in hooks]
    handles += [
        block.output.register_forward_hook(lambda m, _i, out: m.bias.expand_as(out))
        for block in model.blocks
    ]
    wanted = model(task.clean).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert float((wanted - model(task.clean).logits).abs().min()) > 0


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["patch", "zero"])
def test_any_circuit_is_what_its_edges_say(ablation):
    model, task = lively(), pairs()
    finder = CircuitFinder(model)
    names = {*whole(finder.graph).edges()}
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        present = torch.rand(finder.graph.senders, finder.graph.receivers, generator=draws) < 0.7
        circuit = circuit_of(finder.graph, present)
        found = finder.run(circuit, task.clean, task.corrupted, ablation=ablation)
        removed = names - {*circuit.edges()}
        wanted = without(model, task.clean, names, removed, ablation, task.corrupted)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_queries_see_what_comes_after_them():
    ids = pairs().clean
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 9
    for causal in (False, True):
        model = lively(causal)
        moved = (model(ids).logits - model(other).logits)[:, :-1].abs()
        assert bool(moved.any()) != causal
        full = whole(CircuitFinder(model).graph)
        finder = CircuitFinder(model)
        runs = [finder.run(full, x, x) for x in (ids, other)]
        torch.testing.assert_close((runs[0] - runs[1])[:, :-1].abs(), moved, rtol=0, atol=1e-12)


def sequential(model, task, threshold, ablation):
    """ACDC as its authors wrote it down, a whole run for each edge."""
    finder = CircuitFinder(model)
    graph, rows = finder.graph, torch.arange(len(task))
    names = {*whole(graph).edges()}
    with torch.no_grad():
        clean = model(task.clean).logits[rows, task.positions].log_softmax(-1)

    def kl(removed):
        logits = without(model, task.clean, names, removed, ablation, task.corrupted)
        law = logits[rows, task.positions].log_softmax(-1)
        return float((clean.exp() * (clean - law)).sum(-1).mean())

    removed, value = set(), 0.0
    for receiver in graph.order():
        readers = graph.readers(receiver)
        ends = {graph.sender_names[s] for s in readers}
        dead = readers and not any(e.split("->")[0] in ends for e in names - removed)
        for sender in graph.candidates(receiver):
            edge = {graph.name(sender, receiver)}
            new = value if dead else kl(removed | edge)
            if new - value < threshold:
                removed, value = removed | edge, new
    return names - removed


@pytest.mark.parametrize(("causal", "ablation", "threshold"), [
    (False, "patch", 0.3), (False, "zero", 0.3), (False, "zero", 1.0), (True, "zero", 0.3),
])  # fmt: skip
def test_acdc_decides_as_a_run_for_each_edge_does(causal, ablation, threshold):
    model, task = lively(causal), pairs()
    wanted = sequential(model, task, threshold, ablation)
    finder = CircuitFinder(model)
    assert 5 < len(wanted) < finder.graph.edges - 5
    for most in (1, 7, 64):
        found = finder.acdc(task, threshold, ablation=ablation, max_rows=most, progress=False)
        assert {*found.edges()} == wanted


def test_effects_of_single_edges():
    model, task = lively(), pairs()
    finder = CircuitFinder(model)
    names, rows = {*whole(finder.graph).edges()}, torch.arange(5)
    found = finder.edge_effects(task, metric="nll", ablation="zero", progress=False).scores

    def nll(removed):
        logits = without(model, task.clean, names, removed)[rows, task.positions]
        return -logits.log_softmax(-1)[rows, task.answers].mean()

    for name in names:
        wanted = float(nll({name}) - nll(set()))
        assert float(found[finder.graph.edge(name)]) == pytest.approx(wanted, abs=1e-6)


@torch.no_grad()
def test_edges_that_weights_have():
    model = lively(heads=1)
    for p in model.parameters():
        p.zero_()
    # what is embedded: dimension 0
    model.positions.weight[1, 0] = 1
    first, second = model.blocks
    # a query that no key meets, and a value that is written to dimension 1, none to dimension 2
    first.parts["q"].weight[0, 0] = 1
    first.parts["k"].weight[1, 0] = 1
    first.parts["v"].weight[2, 0] = 1
    first.output.weight[1, 2] = first.output.weight[2, 3] = 1
    # an MLP that reads dimension 1, and 0 into what nothing leaves; it writes 3, and 2 by a bias
    # alone, and nothing to 4
    first.inner.weight[0, 1] = first.inner.weight[1, 0] = first.inner.bias[3] = 1
    first.outer.weight[3, 0] = first.outer.weight[2, 3] = first.outer.weight[4, 5] = 1
    # a query of dimension 2 meets a constant key, and one of 4; values of 3, and of 1 for nothing
    second.parts["q"].weight[0, 2] = second.parts["k"].bias[0] = second.parts["k"].weight[0, 4] = 1
    second.parts["v"].weight[0, 3] = second.parts["v"].weight[2, 1] = 1
    second.output.weight[5, 0] = 1
    # it reads, and nobody reads it
    second.inner.weight[0, 0] = second.outer.weight[7, 0] = 1
    model.unembed.weight[0, 5] = 1
    assert sorted(tracr.supported(model).edges()) == sorted([
        "input->a0.h0<v>", "a0.h0->m0", "m0->a1.h0<q>", "m0->a1.h0<v>", "a1.h0->logits",
    ])  # fmt: skip


# --- compiled programs ----------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_model_is_tracrs(compiled, name):
    theirs, made = compiled[name]
    executor, adapter = CircuitFinder(made.model).executor, adapter_of(made.model)
    # each length takes jax a second
    for values, ids in [*every(made)][::-3]:
        encoded = [theirs.input_encoder.encode(["compiler_bos", *x]) for x in values]
        assert encoded == ids.tolist()
        wanted = theirs.forward(theirs.params, ids.numpy())
        run = executor.plain(ids)
        output = torch.from_numpy(np.array(wanted.transformer_output.output))
        torch.testing.assert_close(run.final, output, rtol=0, atol=1e-5)
        heads = made.model.config.heads
        for half, layer in enumerate(wanted.transformer_output.layer_outputs):
            first = 1 + half // 2 * (heads + 1)
            mine = run.senders[first + heads if half % 2 else slice(first, first + heads)]
            mine = mine if half % 2 else mine.sum(0)
            torch.testing.assert_close(mine, torch.from_numpy(np.array(layer)), rtol=0, atol=1e-5)
        logits = made.model(ids).logits
        torch.testing.assert_close(adapter.logits(run.final), logits, rtol=0, atol=1e-5)
        read = torch.from_numpy(np.array(wanted.unembedded_output))
        if made.outputs is None:
            torch.testing.assert_close(logits[..., 0], read, rtol=0, atol=1e-5)
        else:
            assert torch.equal(logits.argmax(-1), read.long())


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_does_what_the_program_says(compiled, name):
    theirs, made = compiled[name]
    for values, ids in every(made):
        logits = made.model(ids).logits[:, 1:]
        wanted = [DOES[name](x) for x in values]
        if made.outputs is None:
            torch.testing.assert_close(logits[..., 0], torch.tensor(wanted), rtol=0, atol=1e-4)
        else:
            found = [[made.outputs[i] for i in row] for row in logits.argmax(-1).tolist()]
            assert found == wanted
    # and so does tracr's own interface, of the longest
    for x, does in zip(values[1::50], wanted[1::50], strict=True):
        decoded = theirs.apply(["compiler_bos", *x]).decoded[1:]
        assert decoded == (pytest.approx(does) if made.outputs is None else does)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_the_circuit_is_the_programs(compiled, name):
    made = compiled[name][1]
    matters, idle = EDGES[name]
    assert sorted(made.circuit.edges()) == sorted(matters)
    assert sorted(made.support.edges()) == sorted(matters + idle)
    assert torch.equal(made.circuit.scores > 0, made.circuit.present)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_edges_matter_or_do_not(compiled, name):
    """On every input, by a run of its own for each edge."""
    made = compiled[name][1]
    names, changes = {*whole(made.circuit.graph).edges()}, {}
    for _, ids in every(made):
        plain = without(made.model, ids, names, set())
        for edge in names:
            change = (without(made.model, ids, names, {edge}) - plain)[:, 1:].abs().max()
            changes[edge] = max(float(change), changes.get(edge, 0))
    inside, support = {*made.circuit.edges()}, {*made.support.edges()}
    assert min(changes[edge] for edge in inside) > 0.4
    assert max((changes[edge] for edge in support - inside), default=0) < 1e-5
    assert not any(changes[edge] for edge in names - support)
    # nor do all others together
    for _, ids in every(made):
        found = without(made.model, ids, names, names - inside)[:, 1:]
        torch.testing.assert_close(found, made.model(ids).logits[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.peer
@torch.no_grad()
def test_why_some_edges_of_the_weights_do_not_matter(compiled):
    made = compiled["reverse"][1]
    adapter = adapter_of(made.model)
    for values, ids in every(made):
        x = made.model.embed(ids)[None]
        q, k = (adapter.part(0, part, [0], x)[0] for part in "qk")
        # the length is counted by a head that selects everything: all keys are alike
        scores = q @ k.mT * adapter.scale(0)
        assert float((scores - scores[..., :1]).abs()[:, 1:].max()) < 1e-4
        # what is constant in a query asks for BOS, by a factor of exp(14) less than what selects
        run = CircuitFinder(made.model).executor.plain(ids)
        keys = adapter.part(3, "k", [0], run.attention[3][None])[0]
        asked = adapter.part(3, "q", [0], run.senders[[6]])[0] @ keys.mT
        constant = adapter.part(3, "q", [0], x)[0] @ keys.mT
        assert float(constant[:, :, 1:].abs().max()) == 0
        assert float(constant[:, :, 0].min()) > 0
        best = asked[:, 1:].max(-1)
        assert torch.equal(best.indices, torch.arange(len(values[0]), 0, -1).expand(len(ids), -1))
        assert float((best.values - constant[:, 1:, 0]).min() * adapter.scale(3)) > 14


def search(made, threshold, length=None, **options):
    task = made.task(length=length)
    options = {"metric": made.metric(task), "ablation": "zero", "progress": False} | options
    return CircuitFinder(made.model).acdc(task, threshold, **options)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_acdc_finds_the_circuit(compiled, name):
    made = compiled[name][1]
    found = [search(made, threshold) for threshold in THRESHOLDS]
    for circuit in found:
        # precision and recall are 1
        assert [*(circuit - made.circuit).edges()] == []
        assert [*(made.circuit - circuit).edges()] == []
    for mode in ("pessimistic", "trapezoid"):
        assert auc_roc(found, made.circuit, mode=mode).area == 1


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_single_edges_find_it(compiled, name):
    made = compiled[name][1]
    finder, task = CircuitFinder(made.model), made.task()
    options = {"metric": made.metric(task), "ablation": "zero", "progress": False}
    effects = finder.edge_effects(task, **options)
    assert auc_roc(effects, made.circuit).area == 1
    assert float(effects.scores[made.circuit.present].min()) > 1e-2
    judged = finder.evaluate(made.circuit, task, [made.metric(task)], ablation="zero")
    assert next(iter(judged.values()))["recovered"] == pytest.approx(1, abs=1e-6)


@pytest.mark.peer
def test_at_full_length_a_count_of_nothing_is_right(compiled):
    made = compiled["reverse"][1]
    missing = made.circuit - search(made, 1e-3, length=5)
    assert [*missing.edges()] == ["input->a0.h0<v>", "a0.h0->m0"]


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_change_no_decision(compiled, name):
    made = compiled[name][1]
    one, many = (search(made, 1e-3, max_rows=rows) for rows in (1, 64))
    assert torch.equal(one.present, many.present)
    torch.testing.assert_close(one.scores, many.scores, rtol=0, atol=1e-6, equal_nan=True)
    assert many.provenance["batches"] < one.provenance["batches"]


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_of_edges_that_weights_have(compiled, name):
    made = compiled[name][1]
    task = made.task(8)
    scores = CircuitFinder(made.model).eap(task, metric=made.metric(task), ig_steps=5).scores
    assert bool(scores.isfinite().all())
    assert not scores[~made.support.present].any()
    graph = made.circuit.graph
    last = made.circuit.present[:, graph.logits]
    assert bool((scores[:, graph.logits] != 0)[last].all())


@pytest.mark.peer
@torch.no_grad()
def test_tasks(compiled):
    reverse, proportion = (compiled[name][1] for name in NAMES[:2])
    task = reverse.task()
    assert task.clean.shape == task.corrupted.shape == (3**4 * 4, 5)
    assert task.positions.tolist() == [1, 2, 3, 4] * 3**4
    assert len({tuple(x) for x in task.clean.tolist()}) == 3**4
    assert {tuple(x) for x in task.clean.tolist()} == {tuple(x) for x in task.corrupted.tolist()}
    assert not (task.clean == task.corrupted).all(1).any()
    ids = {value: i for i, value in enumerate(reverse.outputs)}
    values = {i: value for value, i in reverse.tokens.items()}
    for x, position, answer in zip(task.clean, task.positions, task.answers, strict=True):
        assert int(answer) == ids[values[int(x[5 - position])]]
    both = torch.cat([task.answers[:, None], task.wrong_answers], 1).sort(1).values
    assert torch.equal(both, torch.arange(3).expand(len(both), -1))
    assert reverse.metric(task) == "kl"
    a, b, c = (reverse.task(6, length=2, seed=seed).fingerprint for seed in (0, 0, 1))
    assert a == b != c
    assert len(reverse.task(6, length=2)) == 12
    task = proportion.task(9)
    assert task.wrong_answers is None
    assert task.answers.tolist() == [0] * 36
    metric = proportion.metric(task)
    logits = proportion.model(task.clean).logits[torch.arange(36), task.positions]
    rows = torch.stack([logits, logits + 0.5])
    rows[0, 0] += 3
    torch.testing.assert_close(metric(rows), torch.tensor([9 / 36, 0.25]), rtol=1e-6, atol=0)


@pytest.mark.peer
def test_bad_input(compiled):
    theirs, made = compiled["reverse"]
    for options in ({"n": 0}, {"length": 0}, {"length": 6}):
        with pytest.raises(ValueError, match="an integer in"):
            made.task(**options)
    with pytest.raises(ValueError, match="n: expected a number where there are over 65536"):
        dataclasses.replace(made, tokens=dict.fromkeys(range(20), 0)).task()
    activations = [{"activation_function": f} for f in (abs, lambda x: max(x, 0) ** 2)]
    for change in ({"layer_norm": True}, *activations):
        config = dataclasses.replace(theirs.model_config, **change)
        with pytest.raises(ValueError, match="assembled: expected no norms, and rectifiers"):
            tracr.to_torch(dataclasses.replace(theirs, model_config=config))


def test_without_tracr(monkeypatch):
    monkeypatch.setitem(sys.modules, "tracr", None)
    monkeypatch.setitem(sys.modules, "tracr.compiler", None)
    with pytest.raises(ImportError, match=r"pip install 'pahq\[tracr\]'"):
        tracr.reverse()
    code = "import sys, pahq.truth.tracr; print(*({'tracr', 'jax', 'haiku'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("causal", [True, False])
def test_means_are_over_what_is_seen(causal):
    finder, task = CircuitFinder(lively(causal)), pairs()
    plain = finder.executor.plain(task.corrupted)
    found = ablated(finder.executor, plain, "mean", task.positions)
    size = task.corrupted.shape[1]
    ends = (task.positions + 1).tolist() if causal else [size] * len(task)
    seen = [(n, t) for n, end in enumerate(ends) for t in range(end)]
    assert not causal or len(seen) < task.corrupted.numel()
    wanted = torch.stack([plain.senders[:, n, t] for n, t in seen], 1).mean(1)
    torch.testing.assert_close(found.senders[:, 0, 0], wanted, rtol=0, atol=1e-5)


def test_layers_in_the_hosts_memory(compiled):
    made = compiled["reverse"][1]
    task, model = made.task(8), copy.deepcopy(made.model)
    wanted = CircuitFinder(made.model).acdc(task, 1e-3, ablation="zero", progress=False)
    streamed = CircuitFinder(model, offload="cpu", device="cpu")
    found = streamed.acdc(task, 1e-3, ablation="zero", progress=False)
    assert torch.equal(found.present, wanted.present)
