"""Sampling by Gumbel-max and the refill of slots, against loops, laws and one another."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from shared_kernels.ops.sampling import (
    SlotState,
    gumbel_noise,
    gumbel_sample,
    logit_threshold,
    op,
    slot_refill_,
)
from shared_kernels.ops.sampling import fields as f
from shared_kernels.random import constants as k
from shared_kernels.random import philox4x32, reference
from shared_kernels.testing import check_op

KINDS = ["numba", "triton"]


def make(rows=4, vocab=3001, scale=3.0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = scale * torch.randn(rows, vocab, generator=generator)
    keys = torch.randint(0, 1 << 32, (rows, 2), generator=generator)
    index = torch.randint(0, 1 << 32, (rows,), generator=generator)
    return logits.to(device, dtype), keys.to(device), index.to(device)


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


def test_gumbel_is_minus_log_of_minus_log():
    edges = [0, 1, 2, 3, 1 << 8, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]
    drawn = torch.randint(0, 1 << 32, (200_000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.tensor(edges), drawn, drawn >> 12])
    v = (words >> 1).float().double().mul(k.TWO_M31).add(k.TWO_M32).float().double()
    exact = -torch.log(-torch.log1p(-v.clamp(max=k.ONE_BELOW)))
    found = reference.gumbel(words).double()
    assert float((found - exact).abs().max()) < 2e-6
    # the winners of an argmax are large, and must be told apart
    assert float(((found - exact) / exact)[exact > 4].abs().max()) < 2.5e-7
    assert len(reference.gumbel(torch.arange(200)).unique()) == 100


def test_noise_is_a_closed_form():
    keys, index = torch.tensor([[5, 1 << 31], [7, 9]]), torch.tensor([3, (1 << 32) - 1])
    noise = gumbel_noise(keys, index, 2500)
    assert noise.shape == (2, 2500)
    for row, token in itertools.product(range(2), (0, 255, 256, 1023, 1024, 2499)):
        block = token // 1024 * 256 + token % 256
        counter = torch.tensor([block, int(index[row]), 0, k.DOMAIN_TOKEN << k.DOMAIN_SHIFT])
        word = philox4x32(counter, keys[row])[token // 256 % 4]
        assert noise[row, token] == reference.gumbel(word)


def test_noise_follows_its_law():
    keys = torch.stack([torch.arange(40), torch.arange(40)], 1)
    noise = gumbel_noise(keys, torch.arange(40), 5000).double()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    # tokens, positions and keys are independent of one another
    for moved in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(256, 1)):
        assert abs(float(torch.corrcoef(torch.stack([noise.ravel(), moved.ravel()]))[0, 1])) < 0.01


@pytest.mark.parametrize("impl", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("filtered", [False, True])
def test_same_token_as_the_definition(kernel_device, impl, temperature, filtered):
    device = place(impl, kernel_device)
    logits, keys, index = make(device=device)

    def draw(logits, impl):
        filters = {"top_k": 300, "top_p": 0.8} if filtered else {}
        limit = logit_threshold(logits, temperature=temperature or 1.0, **filters)
        options = {"temperature": temperature, "threshold": limit}
        return gumbel_sample(logits, keys, index, impl=impl, **options)

    found = draw(logits, impl)
    assert torch.equal(found[0], draw(logits, "reference")[0])
    exact = draw(logits.double(), "reference")
    for a, b in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *KINDS])
@pytest.mark.parametrize("vocab", [1, 2, 255, 257, 1023, 1025, 4096, 4097])
def test_widths(kernel_device, impl, vocab):
    device = place(impl, kernel_device)
    logits, keys, index = make(2, vocab, device=device)
    token, logprob, kept, entropy = gumbel_sample(logits, keys, index, impl=impl)
    score = (logits.cpu() + gumbel_noise(keys.cpu(), index.cpu(), vocab)).max(-1)
    assert torch.equal(token.cpu(), score.indices)
    law = torch.log_softmax(logits.double(), -1).cpu()
    wanted = law.gather(1, token.cpu()[:, None])[:, 0]
    torch.testing.assert_close(logprob.double().cpu(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        entropy.double().cpu(), -(law.exp() * law).sum(-1), rtol=0, atol=1e-5
    )
    assert not kept.any()


@pytest.mark.parametrize("impl", ["reference", *KINDS])
def test_what_is_not_finite(kernel_device, impl):
    device = place(impl, kernel_device)
    logits, keys, index = make(6, 1500, device=device)
    logits[0, 1400] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3, :1499] = float("-inf")
    logits[4, 7] = float("-inf")
    token, logprob, _, entropy = gumbel_sample(logits, keys, index, impl=impl)
    assert token[:4].tolist() == [-1, -1, -1, 1499]
    assert logprob[:3].isnan().all()
    assert logprob[3] == 0
    assert float(entropy[3]) == 0
    assert logprob[4:].isfinite().all()
    assert entropy[4:].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *KINDS])
def test_equal_scores_go_to_the_lowest_token(kernel_device, impl):
    device = place(impl, kernel_device)
    logits = torch.zeros(1, 9000, device=device)
    logits[0, [300, 5000, 8999]] = 1.0
    keys = torch.zeros(1, 2, dtype=torch.int64, device=device)
    assert gumbel_sample(logits, keys, keys[:, 0], temperature=0.0, impl=impl)[0] == 300


@pytest.mark.parametrize("impl", ["reference", *KINDS])
def test_rows_may_be_views_of_one(kernel_device, impl):
    device = place(impl, kernel_device)
    logits, _, _ = make(1, 1100, device=device)
    _, keys, index = make(9, 5, device=device)
    found = gumbel_sample(logits.expand(9, -1), keys, index, impl=impl)
    wanted = gumbel_sample(logits.repeat(9, 1), keys, index, impl=impl)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert len(found[0].unique()) > 3


def test_a_row_does_not_depend_on_its_neighbours(kernel_device):
    logits, keys, index = make(8, 2000, device=kernel_device)
    for impl in ("triton", *(["numba"] if kernel_device == "cpu" else [])):
        whole = gumbel_sample(logits, keys, index, impl=impl)
        for row in (0, 3, 7):
            part = slice(row, row + 1)
            alone = gumbel_sample(logits[part], keys[part], index[part], impl=impl)
            for a, b in zip(alone, whole, strict=True):
                assert torch.equal(a[0], b[row])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_law(temperature, top_p):
    logits = torch.tensor([[1.0, -0.5, 0.3, 2.0, float("-inf"), 0.0]])
    count = 60_000
    keys = torch.stack([torch.arange(count), torch.full((count,), 17)], 1)
    index = torch.arange(count) % 5
    limit = logit_threshold(logits, temperature=temperature, top_p=top_p)
    token, _, kept, _ = gumbel_sample(
        logits.expand(count, -1), keys, index, temperature=temperature,
        threshold=None if limit is None else limit.expand(count).contiguous(),
    )  # fmt: skip
    law = (logits[0].double() / temperature).softmax(-1)
    if limit is not None:
        law = torch.where(logits[0].double() / temperature >= float(limit), law, 0.0)
        torch.testing.assert_close(kept[0].exp().double(), law.sum(), rtol=0, atol=1e-6)
        law /= law.sum()
    seen = np.bincount(token.numpy(), minlength=6)
    likely = law.numpy() > 0
    assert not seen[~likely].any()
    assert stats.chisquare(seen[likely], count * law.numpy()[likely]).pvalue > 1e-3


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2},
                                     {"top_k": 40, "top_p": 0.9, "min_p": 0.05}])  # fmt: skip
def test_threshold_keeps_what_transformers_keeps(filters):
    from transformers import generation

    warpers = {
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper,
    }
    logits, _, _ = make(6, 200, dtype=torch.float64)
    scores = logits / 0.8
    for name, value in filters.items():
        scores = warpers[name](value)(None, scores)
    limit = logit_threshold(logits, temperature=0.8, **filters)
    assert torch.equal(logits / 0.8 >= limit[:, None], scores > float("-inf"))


def test_threshold_of_nothing():
    logits, _, _ = make(2, 10)
    assert logit_threshold(logits, top_k=10, top_p=1.0) is None
    # an infinitely small nucleus still holds the best token
    limit = logit_threshold(logits, top_p=1e-9)
    assert torch.equal((logits >= limit[:, None]).sum(-1), torch.ones(2, dtype=torch.int64))


# --- slots -----------------------------------------------------------------------------------


class Loop:
    """The same bookkeeping in plain Python."""

    def __init__(self, limits, prefixes, queue, slots, places):
        self.limits, self.prefixes, self.waiting = limits, prefixes, list(queue)
        self.held = [-1] * slots
        self.places, self.written = places, {}
        self.reason = dict.fromkeys(range(len(limits)), 0)
        self.steps = self.busy = self.clock = 0

    def fill(self):
        for slot in range(self.places):
            if self.held[slot] < 0 and self.waiting:
                self.held[slot] = self.waiting.pop(0)

    def step(self, token, eos):
        self.clock += 1
        if any(row >= 0 for row in self.held):
            self.steps = self.clock
        for slot, row in enumerate(self.held):
            if row < 0:
                continue
            self.busy += 1
            if token[slot] < 0:
                self.reason[row] = f.NOT_FINITE
            else:
                self.written[row].append(token[slot])
                if token[slot] in eos:
                    self.reason[row] = f.STOPPED
                elif len(self.written[row]) >= self.limits[row]:
                    self.reason[row] = f.CUT
            if self.reason[row]:
                self.held[slot] = -1
        self.fill()


def check_tables(state, loop):
    slots, rows = state.slots.cpu(), state.rows.cpu()
    lanes = len(loop.held)
    assert slots[f.ROW].tolist() == loop.held
    for slot, row in enumerate(loop.held):
        if row < 0:
            assert slots[[f.LENGTH, f.POSITION, f.TOKEN], slot].tolist() == [0, 0, 0]
            assert slots[f.PREFIX, slot] == -1
            continue
        count = len(loop.written[row])
        wanted = [count, loop.written[row][-1], 10 * loop.prefixes[row] + count - 1]
        assert slots[[f.LENGTH, f.TOKEN, f.POSITION], slot].tolist() == wanted
        assert torch.equal(slots[f.PREFIX :, slot], rows[f.ROW_PREFIX :, row])
    order, tiles = state.order.tolist(), state.tiles.cpu()
    assert sorted(order) == list(range(lanes))
    covered = Counter()
    for first, count in tiles.T.tolist():
        assert count <= state.tile
        members = order[first : first + count]
        assert len({int(slots[f.PREFIX, m]) for m in members}) <= 1
        covered.update(members)
    assert covered == Counter(s for s in range(lanes) if loop.held[s] >= 0)
    groups = Counter(loop.prefixes[row] for row in loop.held if row >= 0)
    assert int((tiles[1] > 0).sum()) == sum(-(-n // state.tile) for n in groups.values())


def run_slots(impl, device, slots, places, count, tile, seed, steps=60):
    random = np.random.default_rng(seed)
    limits = random.integers(2, 9, count).tolist()
    prefixes = random.integers(0, 4, count).tolist()
    queue = random.permutation(count)[: max(0, count - 1)].tolist()
    state = SlotState.empty(slots, count, 8, places=places, tile=tile, device=device)
    loop = Loop(limits, prefixes, queue, slots, places)
    for row in range(count):
        first = int(random.integers(10, 99))
        loop.written[row] = [first]
        key = random.integers(0, 1 << 32, 2).tolist()
        values = [1, limits[row], 0, prefixes[row], 100 * prefixes[row], 10 * prefixes[row], *key]
        state.rows[:, row] = torch.tensor(values)
        state.tokens[row, 0] = first
    state.queue[: len(queue)] = torch.tensor(queue, dtype=torch.int64)
    state.counters[f.TAIL] = len(queue)
    eos = torch.tensor([5, 3], device=device)
    none = torch.zeros(slots, dtype=torch.int64, device=device)
    slot_refill_(state, none, none.float(), eos, record=False, impl=impl)
    loop.fill()
    check_tables(state, loop)
    for _ in range(steps):
        drawn = random.integers(-1, 25, slots)
        token = torch.from_numpy(drawn).to(device)
        slot_refill_(state, token, token.float() / 8, eos, impl=impl)
        loop.step(drawn.tolist(), {3, 5})
        check_tables(state, loop)
        if all(row < 0 for row in loop.held):
            break
    counters = state.counters.tolist()
    assert counters[f.HEAD] == counters[f.TAIL] == len(queue)
    assert counters[f.STEPS] == loop.steps
    assert counters[f.BUSY] == loop.busy
    assert counters[f.CLOCK] == loop.clock
    assert counters[f.FINISHED] == len(queue)
    for row, written in loop.written.items():
        assert state.rows[[f.COUNT, f.REASON], row].tolist() == [len(written), loop.reason[row]]
        assert state.tokens[row, : len(written)].tolist() == written
        assert state.logprobs[row, 1 : len(written)].tolist() == [t / 8 for t in written[1:]]
        assert not state.tokens[row, len(written) :].any()
    return state


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("slots", "places", "count", "tile"),
    [(1, 1, 3, 1), (5, 4, 11, 2), (16, 16, 40, 3), (24, 20, 30, 16), (8, 8, 1, 4)],
)
def test_refill_against_a_loop(kernel_device, impl, slots, places, count, tile):
    run_slots(impl, place(impl, kernel_device), slots, places, count, tile, seed=slots)


@pytest.mark.gpu
def test_refill_of_many_slots(cuda):
    for slots, tile in ((64, 64), (100, 7), (256, 32)):
        states = [run_slots(i, d, slots, slots, 700, tile, 1, 400)
                  for i, d in (("reference", "cpu"), ("triton", cuda))]  # fmt: skip
        assert torch.equal(states[0].tokens[:-1], states[1].tokens[:-1].cpu())


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    slots=st.integers(1, 9), idle=st.integers(0, 3), count=st.integers(0, 15),
    tile=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_refill_of_odd_sizes(slots, idle, count, tile, seed):
    run_slots("reference", "cpu", slots, max(1, slots - idle), count, tile, seed)


def test_a_running_slot_is_not_touched_by_filling():
    state = SlotState.empty(3, 4, 5)
    state.rows[: f.REASON, :4] = torch.tensor([[1], [5]])
    state.queue[:2] = torch.tensor([2, 0])
    state.counters[f.TAIL] = 2
    none = torch.zeros(3, dtype=torch.int64)
    slot_refill_(state, none, none.float(), none[:0], record=False)
    before = state.slots.clone()
    slot_refill_(state, none + 3, none.float(), none + 3, record=False)
    assert torch.equal(state.slots, before)
    assert state.counters.tolist()[f.FINISHED :] == [0, 0, 0, 0]


# --- the checklist of every op, and bad input --------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_checklist(kernel_device, impl):
    device = place(impl, kernel_device)

    def sample(size):
        logits, keys, index = make(2, size, device=device)
        return logits, keys, index, torch.zeros(2, device=device), 0.9, impl

    def refill(size):
        state = SlotState.empty(size, 4, 5, tile=2, device=device)
        state.rows[: f.REASON, :4] = torch.tensor([[1], [5]], device=device)
        state.slots[f.ROW, 0] = 1
        state.queue[:3] = torch.tensor([2, 0, 3])
        state.counters[f.TAIL] = 3
        token = torch.arange(size, device=device) + 7
        return (
            state.slots, state.rows, state.queue, state.counters, state.order, state.tiles,
            state.tokens, state.logprobs, token, token.float(), token[:1] + 3, size, 2, True, impl,
        )  # fmt: skip

    check_op(op.gumbel_sample, sample, [300, 1025])
    check_op(op.slot_refill_, refill, [5, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_draws_what_the_cpu_draws(cuda, dtype):
    logits, keys, index = make(16, 151_936, dtype=dtype)
    for temperature in (1.0, 0.6):
        wanted = gumbel_sample(logits, keys, index, temperature=temperature)
        moved = (x.to(cuda) for x in (logits, keys, index))
        found = gumbel_sample(*moved, temperature=temperature)
        assert torch.equal(found[0].cpu(), wanted[0])
        for a, b in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2e-5)


def test_bad_input():
    logits, keys, index = make(2, 10)
    with pytest.raises(ValueError, match=r"temperature: expected a number of at least 0, got .*-1"):
        gumbel_sample(logits, keys, index, temperature=-1.0)
    with pytest.raises(ValueError, match="keys: expected shape \\(2, 2\\)"):
        gumbel_sample(logits, keys[:1], index)
    with pytest.raises(TypeError, match="index: expected int64"):
        gumbel_sample(logits, keys, index.int())
    with pytest.raises(ValueError, match="logits: expected at least one token"):
        gumbel_sample(logits[:, :0], keys, index)
    with pytest.raises(ValueError, match="slots"):
        SlotState.empty(0, 3, 4)
    state = SlotState.empty(3, 4, 5)
    with pytest.raises(ValueError, match="token: expected shape \\(3,\\)"):
        slot_refill_(state, index, index.float(), index)
