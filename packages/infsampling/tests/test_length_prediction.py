"""Predictors that look at growing samples: what they see, what they decide, and when they fail."""

import copy
import logging

import numpy as np
import pytest
import torch
from infsampling import (
    InfiniteSampler,
    LengthPredictor,
    OracleLengths,
    ProgressivePredictor,
    SamplingConfig,
    simulate,
)
from infsampling import engine as engine_module
from infsampling.scheduling import parking
from shared_kernels.testing.models import tiny_model
from torch._dynamo.utils import counters

EOS = tuple(range(2, 9))
PROMPTS = [[11, 12, 13, 14, 15], [40, 41]]
LENGTHS = [24, 3, 9, 17, 1, 22, 5, 12, 24, 2, 7, 15, 20, 4, 11, 1, 18, 6, 24, 10, 13]
COUNTS = [8, 13]


def config(**changes):
    base = {
        "max_slots": 4, "max_new_tokens": 24, "eos_token_id": EOS, "seed": 3, "sync_every": 2,
        "rerank_every": 4, "park_limit": float("inf"),
    }  # fmt: skip
    return SamplingConfig(**base | changes)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").eval()


class Watcher:
    """Believes all to be alike at first; then tells lengths apart by what it has counted."""

    probe_tokens = 2

    def __init__(self, lengths=LENGTHS, counts=COUNTS, first=24.0):
        self.lengths, self.first = np.array(lengths, dtype=float), first
        self.owners = np.repeat(np.arange(len(counts)), counts).tolist()
        self.count, self.asked, self.prompts = None, 0, []

    def initial(self, prompts):
        self.prompts = prompts
        return [np.full(len(prompt.samples), self.first) for prompt in prompts]

    def begin(self, owners, hidden):
        assert owners == self.owners
        rows = len(owners) + 1
        self.count = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        self.seen = hidden.new_zeros(rows, 32, hidden.shape[1])
        self.next = hidden.new_zeros(rows, 32)

    def update(self, rows, hidden, logits):
        self.seen[rows, self.count[rows]] = hidden
        self.next[rows, self.count[rows]] = logits.amax(-1)
        self.count[rows] += 1
        self.count[-1].zero_()

    def remaining(self):
        self.asked += 1
        return self.lengths - self.count[:-1].cpu().numpy()

    def finished(self, ids, lengths):
        pass


def same(a, b):
    return (a.completion_ids, a.logprobs) == (b.completion_ids, b.logprobs)


def ask(model, predictor, forced=LENGTHS, **changes):
    sampler = InfiniteSampler(model, config(**changes), length_predictor=predictor)
    return sampler.generate(PROMPTS, COUNTS, forced_lengths=forced)


@pytest.fixture(scope="module")
def plain(llama):
    return ask(llama, None, policy="fifo")


# --- what it decides ---------------------------------------------------------------------------


def test_shapes_of_the_protocols():
    assert isinstance(Watcher(), ProgressivePredictor)
    assert isinstance(OracleLengths([]), LengthPredictor)
    assert not isinstance(OracleLengths([]), ProgressivePredictor)


@pytest.mark.parametrize("policy", ["lpt", "lrpt"])
@pytest.mark.parametrize("slots", [3, 4])
def test_steps_are_those_of_the_simulator(llama, plain, policy, slots):
    predictor = Watcher(first=100.0)
    found = ask(llama, predictor, policy=policy, max_slots=slots)
    assert same(found, plain)
    work, first = np.array(LENGTHS) - 1, np.full(21, 23.0)
    # what was said at the last ranking is all that is known until the next
    options = {"sync_every": 2, "rerank_every": 4, "park_limit": float("inf")}
    blind = simulate(work, slots, policy, first, **options)
    options |= {"probe": 2, "remaining": lambda row, done: max(float(work[row] - done), 1.0)}
    expected = simulate(work, slots, policy, first, **options)
    assert found.stats.decode_steps == expected.steps <= blind.steps - (slots == 4)
    assert found.stats.swaps == expected.swaps > 0
    assert found.stats.slot_utilisation == pytest.approx(expected.utilisation)
    assert (predictor.asked == 1) == (policy == "lpt")


def test_a_probe_orders_once(llama, plain):
    """All have the probe first; from then on nothing that runs is taken out."""
    found = ask(llama, Watcher(first=100.0), policy="lpt")
    waves = -(-sum(n > 1 for n in LENGTHS) // 4)
    assert found.stats.swaps <= 4 * waves
    assert same(found, plain)
    # without a progressive predictor nothing is parked
    stats = ask(llama, OracleLengths([LENGTHS[:8], LENGTHS[8:]])).stats
    assert (stats.swaps, stats.policy) == (0, "lpt")


def test_the_policy_follows_from_the_predictor(llama, plain):
    for predictor, policy in (
        (None, "turns"), (Watcher(), "lrpt"), (OracleLengths([LENGTHS[:8], LENGTHS[8:]]), "lpt"),
    ):  # fmt: skip
        found = ask(llama, predictor, policy="auto")
        assert found.stats.policy == policy
        assert same(found, plain)
        assert found.stats.decode_steps == ask(llama, predictor, policy=policy).stats.decode_steps


@pytest.mark.parametrize("changes", [{"max_slots": 24}, {"policy": "sjf"}, {"policy": "turns"}, {}])
def test_no_probe_where_it_does_not_pay(llama, changes):
    predictor = Watcher()
    if not changes:
        # six waves of ten steps
        predictor.probe_tokens = 10
    found = ask(llama, predictor, **{"policy": "lpt"} | changes)
    assert predictor.count is None
    assert found.stats.swaps == 0 or changes == {"policy": "turns"}


def test_when_a_probe_pays():
    values = np.full(32, 100.0)
    assert parking.worth_probing(values, 8, 16)
    # 4 waves of 26 are over a quarter of 400 steps
    assert not parking.worth_probing(values, 8, 26)
    assert not parking.worth_probing(values, 32, 1)
    assert not parking.worth_probing(values, 8, 0)
    assert not parking.worth_probing(values[:0], 8, 16)


def test_a_ranking_with_a_probe():
    ranking = parking.Ranking("lpt", np.array([9.0, 9.0, 50.0, 20.0]), probe=4)
    assert ranking.due(7, 64)
    # one that waits has not had its probe: it goes first, whatever it is believed to need
    found = ranking.choose([0, 1], [2], [3], np.array([4, 2, 4, 0]), full=True)
    assert found == ([0], [(0, 3)])
    # one that runs has not: nobody is moved for what is believed, and free slots are filled
    done = np.array([4, 2, 4, 4])
    assert ranking.choose([0, 1], [2, 3], [], done, full=True) == ([], [])
    assert ranking.choose([-1, 1], [0, 2, 3], [], done, full=True) == ([], [(0, 2)])
    assert ranking.due(8, 64)
    # all have: the longest two of all run, and stay
    done = np.array([6, 4, 4, 4])
    found = ranking.choose([0, 1], [2, 3], [], done, full=True)
    assert found == ([0, 1], [(0, 2), (1, 3)])
    assert not ranking.due(64, 64)
    done = np.array([6, 4, 49, 4])
    assert ranking.choose([2, -1], [0, 1], [], done, full=False) == ([], [(1, 1)])


# --- what it sees ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lpt", "lrpt"])
def test_states_are_kept_by_sample(llama, plain, policy):
    """Through swaps: the states and logits of every token that was read, in order."""
    predictor = Watcher(first=100.0)
    # free lengths, and predictions that have nothing to do with them
    found = ask(llama, predictor, forced=None, policy=policy)
    assert found.stats.swaps > 0
    for row, tokens in enumerate(found.completion_ids):
        ids, read = PROMPTS[found.prompt_index[row]], len(tokens) - 1
        assert int(predictor.count[row]) == read
        with torch.no_grad():
            whole = llama(torch.tensor([ids + tokens]), output_hidden_states=True)
        part = slice(len(ids), len(ids) + read)
        torch.testing.assert_close(
            predictor.seen[row, :read], whole.hidden_states[-1][0, part], rtol=0, atol=2e-5
        )
        torch.testing.assert_close(
            predictor.next[row, :read], whole.logits[0, part].amax(-1), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize(("chunk", "together"), [(2, 0), (512, 0), (512, 16)])
def test_states_of_prompts_only_for_who_wants_them(llama, chunk, together, monkeypatch):
    monkeypatch.setattr(engine_module, "tokens_together", lambda device, chunk: together)
    predictor = Watcher()
    ask(llama, predictor, prefill_chunk=chunk)
    assert [prompt.states for prompt in predictor.prompts] == [None, None]
    predictor.wants_states = True
    ask(llama, predictor, prefill_chunk=chunk)
    assert not llama.base_model._forward_hooks
    for prompt, ids in zip(predictor.prompts, PROMPTS, strict=True):
        with torch.no_grad():
            whole = llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(prompt.states, whole, rtol=0, atol=2e-5)
        torch.testing.assert_close(prompt.states[-1], prompt.hidden, rtol=0, atol=0)


# --- what it must not change -------------------------------------------------------------------


def broken(method, answer):
    predictor = Watcher(first=100.0)
    inner = getattr(predictor, method)

    def fail(*args):
        if answer is None:
            raise KeyError("lost")
        found = inner(*args)
        return [x * answer for x in found] if method == "initial" else found * answer

    setattr(predictor, method, fail)
    return predictor


@pytest.mark.parametrize("policy", ["lpt", "lrpt"])
@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("initial", None), ("begin", None), ("update", None), ("remaining", None),
        ("finished", None), ("remaining", float("nan")), ("initial", float("nan")),
    ],
)  # fmt: skip
def test_failures_change_no_token(llama, plain, policy, method, answer, caplog):
    model = copy.deepcopy(llama)
    with caplog.at_level(logging.WARNING):
        found = ask(model, broken(method, answer), policy=policy)
    assert same(found, plain)
    assert caplog.text.count("length_predictor failed") == 1
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert not model.base_model._forward_hooks


def test_a_failure_is_told_once(llama, plain, caplog):
    predictor = broken("initial", None)
    predictor.finished = predictor.initial
    assert same(ask(llama, predictor), plain)
    assert caplog.text.count("length_predictor failed") == 1


def test_lost_in_the_middle(llama, plain, caplog):
    """A predictor that fails late leaves the samples as they are, and is asked no more."""
    predictor = Watcher(first=100.0)
    update, calls = predictor.update, []

    def late(*args):
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("out of luck")
        update(*args)

    predictor.update = late
    found = ask(llama, predictor, policy="lrpt")
    assert same(found, plain)
    assert len(calls) == 9
    assert caplog.text.count("length_predictor failed") == 1


def test_buffers_are_kept_with_and_without(llama, plain):
    sampler = InfiniteSampler(llama, config(policy="lrpt"))
    without = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
    engine = sampler._engine
    for predictor in (Watcher(first=100.0), None, Watcher(first=100.0)):
        sampler.length_predictor = predictor
        found = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
        assert sampler._engine is engine
        assert same(found, plain)
        assert (found.stats.decode_steps == without.stats.decode_steps) == (predictor is None)
        if predictor is not None:
            # one more than the updates, of those that have any
            assert (predictor.count[:-1].numpy() == np.array(LENGTHS) - 1).all()


@pytest.mark.slow
def test_compiled_steps(llama):
    """Compiled code calls no hooks that came after it: states are kept in all steps."""
    sampler = InfiniteSampler(llama, config(compile=True, policy="lrpt"))
    without = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
    graphs = []
    for _ in range(2):
        sampler.length_predictor = predictor = Watcher(first=100.0)
        found = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
        assert same(found, without)
        graphs.append(counters["stats"]["unique_graphs"])
        plain = Watcher(first=100.0)
        ask(llama, plain, policy="lrpt")
        torch.testing.assert_close(predictor.seen[:-1], plain.seen[:-1], rtol=0, atol=1e-5)
        # buffers that are made anew, and another predictor, find what was compiled
        sampler.close()
    assert graphs[0] == graphs[1] > 0


# --- recorded steps ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("policy", ["lpt", "lrpt"])
def test_recorded_steps(llama, policy, compile):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = copy.deepcopy(llama).cuda()
    sampler = InfiniteSampler(model, config(policy=policy, compile=compile))
    without = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
    for _ in range(2):
        sampler.length_predictor = predictor = Watcher(first=100.0)
        found = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
        assert same(found, without)
        assert found.stats.graph_captures == 1
        assert (predictor.count[:-1].cpu().numpy() == np.array(LENGTHS) - 1).all()
    sampler.length_predictor = None
    found = sampler.generate(PROMPTS, COUNTS, forced_lengths=LENGTHS)
    assert same(found, without)
    assert found.stats.graph_captures == 0


@pytest.mark.gpu
def test_what_waits_for_the_device_cannot_be_recorded(llama, caplog):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = copy.deepcopy(llama).cuda()
    predictor = Watcher(first=100.0)
    update = predictor.update

    def waits(rows, hidden, logits):
        float(hidden.sum())
        update(rows, hidden, logits)

    predictor.update = waits
    options = {"policy": "lrpt", "compile": False}
    found = ask(model, predictor, **options)
    assert same(found, ask(model, None, **options))
    assert found.stats.graph_captures == 1
    assert caplog.text.count("length_predictor failed") == 1
