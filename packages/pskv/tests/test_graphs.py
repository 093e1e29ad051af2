"""Recorded passes: the same scores as passes that are not."""

import numpy as np
import pytest
import torch
from pskv import PrefixScorer
from pskv.graphs import Graphs, _settings, _Trial, rounded
from shared_kernels.ops.prefix_attention import FixedLayout
from shared_kernels.testing.models import tiny_model


class Emulated(Graphs):
    """A graph's contract on a CPU: the first pass of a key runs again on what is copied into it."""

    def wants(self, key):
        return True

    def run(self, key, inputs, layout, forward):
        made = self._recordings.get(key)
        if made is None or (layout is not None and not made[1].take(layout)):
            fixed = None if layout is None else FixedLayout(layout.rows)
            made = self._recordings[key] = ([x.clone() for x in inputs], fixed, forward)
            self.recorded += 1
        for place, value in zip(made[0], inputs, strict=True):
            place.copy_(value)
        self.replayed += 1
        return made[2](made[0], made[1])


def candidates(seed, rows=6, suffix=8, tail=2):
    generator = np.random.default_rng(seed)
    found = np.tile(generator.integers(3, 90, suffix + tail), (rows, 1))
    found[np.arange(rows), np.arange(rows) % suffix] = generator.integers(90, 96, rows)
    return found


def scorers(family, backend, device, plain=None):
    model = tiny_model(family).to(device)
    made = [
        PrefixScorer(model, backend=plain or backend, cuda_graphs=False),
        PrefixScorer(model, backend=backend),
    ]
    prefix = np.random.default_rng(1).integers(3, 90, 17)
    return *made, [scorer.prefill(prefix) for scorer in made]


def assert_same(plain, recorded, prefixes, steps, bound=2e-5, suffix=8):
    for seed in range(steps):
        # other lengths and numbers of rows come in between and have recordings of their own
        rows = candidates(seed, rows=4 + 4 * (seed % 2), suffix=suffix)
        expected, found = (
            scorer.score(prefix, rows, targets=[5, 6, 7])
            for scorer, prefix in zip((plain, recorded), prefixes, strict=True)
        )
        for one, other in zip(found.token_logprobs, expected.token_logprobs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=bound)
        assert torch.equal(found.is_greedy, expected.is_greedy)


@pytest.mark.parametrize(("family", "backend"), [("gemma2", "fused"), ("gpt2", "none")])
def test_what_a_recording_reads_is_in_its_key_and_inputs(family, backend):
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU in this process")
    plain, recorded, prefixes = scorers(family, backend, "cpu", plain="split")
    recorded._passes.graphs = Emulated(recorded.model, torch.device("cpu"), enabled=True)
    assert_same(plain, recorded, prefixes, 3, suffix=4)
    graphs = recorded._passes.graphs
    assert graphs.replayed == 3
    assert graphs.recorded == 2
    # another prefix, of the same length, is another recording
    other = np.random.default_rng(2).integers(3, 90, 17)
    prefixes[:] = [scorer.prefill(other) for scorer in (plain, recorded)]
    assert_same(plain, recorded, prefixes, 1, suffix=4)


def test_padding_sees_itself_alone_and_adds_an_eighth_at_most():
    for tokens in (1, 8, 9, 63, 64, 100, 1000, 4097):
        assert tokens <= rounded(tokens) <= max(tokens + 7, tokens * 1.125 + 1)
    from pskv import plan

    packed = plan([[1, 2, 3, 4], [1, 2, 5]])
    size = rounded(len(packed.tokens))
    padded, bare = packed.layout(9, size), packed.layout(9)
    assert padded.queries == size
    assert torch.equal(padded.rows[:-1], bare.rows)
    assert padded.rows[-1, 5] == 0
    # a row of padding and one of the others are never in one tile
    tiles = padded.tables(torch.device("cpu"), 32, 64).tiles
    assert len(packed.tokens) in tiles[:, 1].tolist()


def test_a_cpu_and_a_deterministic_scorer_record_nothing():
    assert not PrefixScorer(tiny_model("llama"))._passes.graphs.enabled


def test_what_keeps_a_pass_from_its_recording():
    model = tiny_model("llama")
    graphs = Graphs(model, torch.device("cpu"), enabled=True)
    assert not graphs.wants("key")
    # stands for a recording
    graphs._recordings["key", *_settings()] = None
    assert graphs.wants("key")
    assert not Graphs(model, graphs.device, enabled=False).wants("key")
    for handle in (
        model.model.layers[1].mlp.register_forward_hook(lambda *a: None),
        model.register_forward_pre_hook(lambda *a: None),
        torch.nn.modules.module.register_module_forward_hook(lambda *a: None),
    ):
        assert not graphs.wants("key")
        handle.remove()
    try:
        torch.set_autocast_enabled("cuda", True)
        assert not graphs.wants("key")
        torch.set_autocast_enabled("cuda", False)
        torch.set_float32_matmul_precision("high")
        assert not graphs.wants("key")
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_float32_matmul_precision("highest")
    assert graphs.wants("key")
    graphs.clear()
    assert not graphs.wants("key")


# -- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def always(cuda, monkeypatch):
    monkeypatch.setattr(_Trial, "bound_by_host", lambda self: True)
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "opt", "phi3", "olmo2"])
def test_replays_agree(always, family, backend):
    plain, recorded, prefixes = scorers(family, backend, always)
    assert_same(plain, recorded, prefixes, 16)
    graphs = recorded._passes.graphs
    assert graphs.enabled
    assert graphs.replayed >= 8
    assert graphs.recorded < graphs.replayed
    assert not plain._passes.graphs.replayed
    sums = [prefix.checksums() for prefix in prefixes]
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


@pytest.mark.gpu
def test_embeddings_replay(always):
    plain, recorded, prefixes = scorers("llama", "fused", always)
    embed = plain.model.get_input_embeddings()
    for seed in range(8):
        rows = torch.from_numpy(np.concatenate([candidates(seed), np.full((6, 2), 7)], 1))
        vectors = embed(rows.to(always)).detach()
        target = torch.tensor([7, 7], device=always)
        expected, found = (
            scorer.score_embeds(prefix, vectors, target).logprobs
            for scorer, prefix in zip((plain, recorded), prefixes, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-5)
    assert recorded._passes.graphs.replayed


@pytest.mark.gpu
def test_only_passes_that_wait_for_the_host_are_recorded(cuda, monkeypatch):
    monkeypatch.setattr(_Trial, "bound_by_host", lambda self: False)
    plain, recorded, prefixes = scorers("llama", "fused", cuda)
    assert_same(plain, recorded, prefixes, 8)
    assert not recorded._passes.graphs.recorded


@pytest.mark.gpu
def test_hooks_are_called(always):
    _, recorded, prefixes = scorers("llama", "fused", always)
    rows, calls = candidates(0), []
    for _ in range(4):
        recorded.score(prefixes[1], rows)
    replayed = recorded._passes.graphs.replayed
    assert replayed
    handle = recorded.model.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    recorded.score(prefixes[1], rows)
    handle.remove()
    assert calls
    assert recorded._passes.graphs.replayed == replayed
    recorded.score(prefixes[1], rows)
    assert recorded._passes.graphs.replayed > replayed


@pytest.mark.gpu
def test_a_model_that_cannot_be_recorded_runs_as_it_did(always):
    plain, recorded, prefixes = scorers("llama", "fused", always)
    layer = recorded.model.model.layers[0]
    forward = layer.forward

    def waits(hidden, *args, **kwargs):
        assert float(hidden.float().abs().sum()) >= 0
        return forward(hidden, *args, **kwargs)

    layer.forward = waits
    assert_same(plain, recorded, prefixes, 8)
    graphs = recorded._passes.graphs
    assert not graphs.enabled
    assert not graphs.replayed


@pytest.mark.gpu
def test_changed_weights_are_seen(always):
    _, recorded, prefixes = scorers("llama", "none", always)
    rows = candidates(0)
    for _ in range(4):
        before = recorded.score(prefixes[1], rows).logprobs
    with torch.no_grad():
        recorded.model.get_output_embeddings().weight.mul_(1.5)
        recorded.model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    shared = recorded.prefill(prefixes[1].ids)
    for _ in range(4):
        after = recorded.score(shared, rows).logprobs
    expected = PrefixScorer(recorded.model, backend="split").score(prefixes[1].ids, rows).logprobs
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-4)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.gpu
def test_recordings_are_given_back_when_memory_runs_out(always, monkeypatch):
    _, recorded, prefixes = scorers("llama", "fused", always)
    rows = candidates(0)
    for _ in range(4):
        expected = recorded.score(prefixes[1], rows).logprobs
    graphs, run, failed = recorded._passes.graphs, recorded._passes.graphs.run, []

    def fails_once(*args):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*args)

    monkeypatch.setattr(graphs, "run", fails_once)
    found = recorded.score(prefixes[1], rows).logprobs
    assert failed
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
