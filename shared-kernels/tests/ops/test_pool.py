"""Softmax-weighted means against float64 loops, in pieces, and over padding of any content."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.pool import PoolState, StepHead, launch, op, plp_step, segment_softmax_pool
from shared_kernels.testing import check_op

F64 = torch.float64
IMPLS = ["reference", "triton"]


def make(tokens=23, width=6, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    return hidden.to(device, dtype), (3 * torch.rand(tokens, generator=generator)).to(device)


def loop(hidden, score):
    total, out = 0.0, torch.zeros(hidden.shape[-1], dtype=F64)
    for h, s in zip(hidden.double().cpu(), score.tolist(), strict=True):
        total += math.exp(s)
        out += math.exp(s) * h
    return out / total


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found.double().cpu(), wanted.double().cpu(), rtol=0, atol=atol)


def bounds(*values, device="cpu"):
    return torch.tensor(values, device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_against_a_loop(kernel_device, impl, monkeypatch):
    monkeypatch.setattr(launch, "PART", 3)
    monkeypatch.setattr(launch, "ROWS", 4)
    device = place(impl, kernel_device)
    hidden, score = make(device=device)
    cuts = [0, 5, 5, 6, 23]
    keep = torch.arange(23, device=device) % 3 > 0
    for mask in (None, keep):
        found = segment_softmax_pool(hidden, score, bounds(*cuts, device=device), mask, impl=impl)
        for row, (low, high) in enumerate(itertools.pairwise(cuts)):
            chosen = torch.arange(low, high, device=device)
            chosen = chosen if mask is None else chosen[keep[chosen]]
            wanted = loop(hidden[chosen], score[chosen]) if len(chosen) else torch.zeros(6)
            close(found.pooled()[row], wanted)
        assert found.total[1] == 0
        assert found.peak[1] == float("-inf")


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_masked_is_not_read(kernel_device, impl):
    device = place(impl, kernel_device)
    hidden, score = make(device=device)
    keep = torch.arange(23, device=device) % 4 > 1
    clean = segment_softmax_pool(hidden, score, bounds(0, 9, 23, device=device), keep, impl=impl)
    hidden[~keep], score[~keep] = float("nan"), float("nan")
    found = segment_softmax_pool(hidden, score, bounds(0, 9, 23, device=device), keep, impl=impl)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_pieces(kernel_device, impl):
    device = place(impl, kernel_device)
    hidden, score = make(device=device)
    whole = segment_softmax_pool(hidden, score, bounds(0, 23, device=device), impl=impl).pooled()
    for cuts in ([0, 23], [0, 1, 23], [0, 4, 4, 9, 22, 23], list(range(24))):
        state = PoolState.empty(1, 6, device=device)
        for low, high in reversed(list(itertools.pairwise(cuts))):
            part = bounds(0, high - low, device=device)
            piece = segment_softmax_pool(hidden[low:high], score[low:high], part, impl=impl)
            state = state.merge(piece)
        close(state.pooled(), whole, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_scores_do(kernel_device, impl):
    device = place(impl, kernel_device)
    hidden, score = make(device=device)
    one = bounds(0, 23, device=device)
    equal = segment_softmax_pool(hidden, torch.full_like(score, 700.0), one, impl=impl)
    close(equal.pooled()[0], hidden.double().mean(0))
    score[7] = 60.0
    assert torch.equal(segment_softmax_pool(hidden, score, one, impl=impl).pooled()[0], hidden[7])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32(kernel_device, impl, dtype):
    device = place(impl, kernel_device)
    hidden, score = make(2500, 70, dtype=dtype, device=device)
    found = segment_softmax_pool(hidden, score, bounds(0, 2500, device=device), impl=impl)
    assert found.weighted.dtype == torch.float32
    close(found.pooled()[0], loop(hidden, score), 2e-6)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=5), width=st.integers(0, 5))
def test_odd_shapes(cuts, width):
    cuts = [0, *sorted(cuts), 30]
    hidden, score = make(30, width, dtype=F64)
    score = score.double()
    found = segment_softmax_pool(hidden, score, bounds(*cuts)).pooled()
    assert found.dtype == F64
    for row, (low, high) in enumerate(itertools.pairwise(cuts)):
        if high > low:
            close(found[row], loop(hidden[low:high], score[low:high]), 1e-13)


def make_step(rows=5, width=7, numbers=4, inner=9, bins=6, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    head = StepHead(
        draw(inner, 2 * width + numbers), draw(inner), draw(inner), draw(bins, inner), draw(bins)
    )
    return draw, head, draw(rows, inner), torch.zeros(rows, 2 * width + numbers).to(device, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_steps_are_the_mean_at_once(kernel_device, impl):
    device = place(impl, kernel_device)
    rows, width = 5, 7
    draw, head, prompt, features = make_step(device=device)
    state = PoolState.empty(rows, width, device=device)
    active = torch.tensor([True, True, False, True, True], device=device)
    seen, scores = [], []
    for step in range(6):
        if step == 3:
            active[1] = False
        hidden, score, numbers = draw(rows, width), draw(rows), draw(rows, 4).float()
        hidden[~active] = float("nan")
        seen.append(hidden)
        scores.append(score)
        probs = plp_step(
            state, hidden, score, numbers, active, features, prompt=prompt, head=head, impl=impl
        )
    for row, steps in ((0, 6), (1, 3), (3, 6)):
        h = torch.stack([x[row] for x in seen[:steps]])
        s = torch.stack([x[row] for x in scores[:steps]])
        wanted = loop(h, s)
        close(state.pooled()[row], wanted, 1e-6)
        if steps == 6:
            x = torch.cat([wanted, h[-1].double().cpu(), numbers[row].double().cpu()])
            close(features[row], x)
            inner = prompt[row].double().cpu() + head.weight.double().cpu() @ x
            inner = torch.nn.functional.layer_norm(
                inner, inner.shape, head.gain.double().cpu(), head.shift.double().cpu()
            )
            z = head.out_weight.double().cpu() @ inner.relu() + head.out_bias.double().cpu()
            close(probs[row], z.softmax(-1))
    assert state.total[2] == 0
    assert not features[2].any()


@pytest.mark.gpu
def test_a_step_in_a_graph(cuda):
    draw, head, prompt, features = make_step(device=cuda, dtype=torch.bfloat16, width=576)
    state = PoolState.empty(5, 576, device=cuda)
    active = torch.ones(5, dtype=torch.bool, device=cuda)
    hidden, score, numbers = draw(5, 576), draw(5).float(), draw(5, 4).float()

    def step():
        return plp_step(state, hidden, score, numbers, active, features, prompt=prompt, head=head)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        probs = step()
    graph.replay()
    found, before = probs.clone(), state.total.clone()
    hidden.copy_(draw(5, 576))
    graph.replay()
    assert (state.total > before).all()
    assert not torch.equal(probs, found)
    torch.testing.assert_close(probs.sum(-1), torch.ones(5, device=cuda))


def test_not_a_number_stays_in_its_row(kernel_device):
    for impl in IMPLS:
        device = place(impl, kernel_device)
        draw, head, prompt, features = make_step(device=device)
        state = PoolState.empty(5, 7, device=device)
        hidden = draw(5, 7)
        hidden[1] = float("nan")
        active = torch.ones(5, dtype=torch.bool, device=device)
        probs = plp_step(
            state, hidden, draw(5), draw(5, 4), active, features,
            prompt=prompt, head=head, impl=impl,
        )  # fmt: skip
        assert probs.isnan().any(-1).tolist() == [False, True, False, False, False]


def test_bad_input():
    hidden, score = make()
    with pytest.raises(ValueError, match="score"):
        segment_softmax_pool(hidden, score[1:], bounds(0, 23))
    with pytest.raises(TypeError, match="cu_seqlens"):
        segment_softmax_pool(hidden, score, bounds(0, 23).float())
    with pytest.raises(ValueError, match="at least one bound"):
        segment_softmax_pool(hidden, score, bounds(0, 23)[:0])
    with pytest.raises(TypeError, match="mask"):
        segment_softmax_pool(hidden, score, bounds(0, 23), torch.ones(23))
    draw, head, _, features = make_step()
    active = torch.ones(5, dtype=torch.bool)
    state = PoolState.empty(5, 7)
    with pytest.raises(ValueError, match="prompt"):
        plp_step(state, draw(5, 7), draw(5), draw(5, 4), active, features, head=head)
    with pytest.raises(ValueError, match="features"):
        plp_step(state, draw(5, 7), draw(5), draw(5, 3), active, features)


@pytest.mark.parametrize("impl", IMPLS)
def test_op_checklist(kernel_device, impl):
    device = place(impl, kernel_device)

    def sums(size):
        hidden, score = make(size, 5, device=device)
        cuts = bounds(0, size // 3, size, device=device)
        return hidden, score, cuts, torch.arange(size, device=device) % 4 > 0, impl

    check_op(op.softmax_segment_sums, sums, sizes=[13, 0, 1, 64])

    def output(size):
        _, head, prompt, _ = make_step(rows=size, device=device)
        return prompt, head.gain, head.shift, head.out_weight, head.out_bias, 1e-5, impl

    check_op(op.plp_output, output, sizes=[5, 0, 1])

    def update(size):
        draw, _, _, features = make_step(rows=size, device=device)
        state = PoolState.empty(size, 7, device=device)
        active = torch.arange(size, device=device) % 3 > 0
        return (*state, draw(size, 7), draw(size), draw(size, 4), active, features, impl)

    check_op(op.plp_update_, update, sizes=[5, 0, 1])
