"""Decoding attention against one float64 softmax over copies, and slots against one another."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.prefix_attention import merge_attention_states
from shared_kernels.ops.prefix_attention.decode import decode_attention, decode_tile, launch, op
from shared_kernels.ops.sampling import SlotState, slot_refill_
from shared_kernels.ops.sampling import fields as f
from shared_kernels.testing import check_op

IMPLS = ["reference", "numba", "triton"]


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


def tables(prefixes, spans, lengths, tile, device="cpu"):
    """The tables of slots on these prefixes, as `slot_refill_` makes them."""
    count = len(lengths)
    state = SlotState.empty(count, count, max(lengths) + 1, tile=tile, device=device)
    for slot, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
        start, size = spans[prefix]
        state.rows[:, slot] = torch.tensor([length, 1 << 30, 0, prefix, start, size, 0, 0])
        state.slots[f.ROW, slot] = slot if length else -1
    none = torch.zeros(count, dtype=torch.int64, device=device)
    # `places` is 0 so that idle slots stay so
    state.places = 0
    slot_refill_(state, none, none.float(), none[:0], record=False, impl="reference")
    fields = (f.LENGTH, f.START, f.PREFIX_LENGTH)
    return *(state.slots[field].contiguous() for field in fields), state.order, state.tiles


def make(lengths, prefixes, sizes, *, heads=2, group=2, dim=16, value_dim=None, capacity=None,
         dtype=torch.float32, device="cpu", seed=0):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    capacity = capacity or max(1, max(lengths))
    slots, total = len(lengths), sum(sizes)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    value_dim = value_dim or dim
    tensors = (
        2 * randn(slots, heads * group, dim), randn(slots * capacity + 1, heads, dim),
        randn(slots * capacity + 1, heads, value_dim) + 1, randn(total, heads, dim),
        randn(total, heads, value_dim) + 1,
    )  # fmt: skip
    starts = [0, *itertools.accumulate(sizes)]
    spans = list(zip(starts, sizes, strict=False))
    tile = decode_tile(heads * group, heads)
    return *tensors, *tables(prefixes, spans, lengths, tile, device)


def exact(q, k, v, shared_k, shared_v, lengths, starts, prefix_lengths, *_, scale=None,
          window=None, softcap=None, sinks=None):  # fmt: skip
    q, k, v, shared_k, shared_v = (x.double().cpu() for x in (q, k, v, shared_k, shared_v))
    slots, heads, dim = q.shape
    group, capacity = heads // k.shape[1], k.shape[0] // slots
    outs, lses = torch.zeros(slots, heads, v.shape[2], dtype=q.dtype), []
    for slot in range(slots):
        n, start, size = int(lengths[slot]), int(starts[slot]), int(prefix_lengths[slot])
        if not n:
            lses.append(torch.full((heads,), float("-inf"), dtype=q.dtype))
            continue
        chosen = [x[start : start + size] for x in (shared_k, shared_v)]
        own = [x[slot * capacity : slot * capacity + n] for x in (k, v)]
        keys, values = (
            torch.cat(pair).repeat_interleave(group, 1) for pair in zip(chosen, own, strict=True)
        )
        z = torch.einsum("hd,nhd->hn", q[slot], keys) * (scale or dim**-0.5)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        if window is not None:
            z[:, : max(0, len(keys) - window)] = float("-inf")
        if sinks is not None:
            z = torch.cat([z, sinks.double().cpu()[:, None]], 1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        outs[slot] = torch.einsum("hn,nhd->hd", z.softmax(-1), values)
        lses.append(z.logsumexp(-1))
    return outs, torch.stack(lses)


def check(found, wanted, bound):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=bound)


@pytest.fixture(autouse=True)
def small_splits(request, monkeypatch):
    if "cuda" not in request.fixturenames and "cuda" not in request.node.name:
        monkeypatch.setattr(launch, "OWN_SPLIT", 32)
        monkeypatch.setattr(launch, "PREFIX_SPLIT", 64)


CASES = [
    ([1, 5, 32, 33], [0, 0, 0, 0], [70], {}),
    ([31, 64, 0, 65, 3], [1, 0, 0, 1, 2], [64, 63, 1], {}),
    ([7, 9], [0, 1], [0, 65], {}),
    ([40, 2, 70], [0, 0, 1], [50, 20], {"window": 45}),
    ([40, 2, 70], [0, 0, 1], [50, 20], {"window": 3, "softcap": 5.0}),
    ([40, 0, 70], [0, 0, 1], [50, 20], {"sinks": True, "scale": 0.3}),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("lengths", "prefixes", "sizes", "options"), CASES)
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (1, 3, 24, 40)])
def test_against_one_softmax(kernel_device, impl, lengths, prefixes, sizes, options, shape):
    heads, group, dim, value_dim = shape
    device = place(impl, kernel_device)
    args = make(lengths, prefixes, sizes, heads=heads, group=group, dim=dim, value_dim=value_dim,
                device=device)  # fmt: skip
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, heads * group, device=device)
    found = decode_attention(*args, impl=impl, **options)
    check(found, exact(*args, **options), 5e-6)


@pytest.mark.parametrize("impl", ["reference"])
def test_float64(impl):
    args = make([40, 2, 70, 0], [0, 0, 1, 1], [50, 20], dtype=torch.float64)
    check(decode_attention(*args, impl=impl), exact(*args), 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("walkers", [2, 16])
def test_tiles_of_many_slots(kernel_device, impl, walkers, monkeypatch):
    monkeypatch.setattr(launch, "PAIRS", 16)
    monkeypatch.setattr(launch, "WALKERS", walkers)
    device = place(impl, kernel_device)
    lengths = [1 + 3 * slot % 40 for slot in range(21)]
    args = make(lengths, [slot % 2 for slot in range(21)], [90, 30], group=4, device=device)
    assert int((args[-1][1] > 0).sum()) == 6
    check(decode_attention(*args, impl=impl), exact(*args), 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_slot_does_not_depend_on_the_others(kernel_device, impl):
    device = place(impl, kernel_device)
    args = make([33, 5, 60], [0, 0, 0], [100, 30], capacity=70, device=device)
    found = decode_attention(*args, impl=impl)
    spans, tile = [(0, 100), (100, 30)], decode_tile(4, 2)
    # others are longer, elsewhere or idle, and slot 0 stands elsewhere in the order
    for prefixes, lengths in (([0, 1, 1], [33, 70, 1]), ([0, 0, 0], [33, 0, 0]), ([1, 0, 0],) * 2):
        if lengths == [1, 0, 0]:
            continue
        others = tables(prefixes, spans, lengths, tile, device)
        again = decode_attention(*args[:5], *others, impl=impl)
        for a, b in zip(again, found, strict=True):
            assert torch.equal(a[0], b[0])
    swapped = [2, 1, 0]
    moved = [args[0][swapped].contiguous()]
    for slab in args[1:3]:
        regions = slab[:-1].unflatten(0, (3, 70))[swapped].flatten(0, 1)
        moved.append(torch.cat([regions, slab[-1:]]))
    others = tables([0, 0, 0], spans, [60, 5, 33], tile, device)
    again = decode_attention(*moved, *args[3:5], *others, impl=impl)
    for a, b in zip(again, found, strict=True):
        assert torch.equal(a[2], b[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_seen_is_not_read(kernel_device, impl):
    device = place(impl, kernel_device)
    args = make([3, 0, 40], [0, 0, 0], [20, 9], capacity=50, device=device)
    clean = decode_attention(*args, impl=impl)
    q, k, v, shared_k, shared_v = (x.clone() for x in args[:5])
    for slab in (k, v):
        slab[3:100] = slab[140:] = float("nan")
    for slab in (shared_k, shared_v):
        slab[20:] = float("nan")
    q[1] = float("nan")
    found = decode_attention(q, k, v, shared_k, shared_v, *args[5:], impl=impl)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)


def test_it_is_the_merge_of_both_parts():
    args = make([9, 30], [0, 0], [40], dtype=torch.float64)
    whole = decode_attention(*args)
    nothing = args[7] * 0
    own = decode_attention(*args[:5], args[5], args[6], nothing, *args[8:])
    queries = args[0]
    logits = torch.einsum("shgd,nhd->shgn", queries.unflatten(1, (2, 2)), args[3]) * 16**-0.5
    shared = torch.einsum("shgn,nhd->shgd", logits.softmax(-1), args[4]).flatten(1, 2)
    merged = merge_attention_states(
        [shared, own[0]], [logits.logsumexp(-1).flatten(1, 2), own[1]], impl="reference"
    )
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    slots=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 2)), min_size=1, max_size=7),
    sizes=st.tuples(*[st.integers(0, 130)] * 3), group=st.integers(1, 3),
    window=st.none() | st.integers(1, 150),
)  # fmt: skip
def test_odd_shapes(slots, sizes, group, window):
    lengths, prefixes = zip(*slots, strict=True)
    args = make(lengths, prefixes, sizes, group=group, dim=9)
    check(decode_attention(*args, window=window), exact(*args, window=window), 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_checklist(kernel_device, impl):
    device = place(impl, kernel_device)

    def arguments(size):
        args = make([size, 3], [0, 1], [size, 5], device=device)
        return *args, args[1].shape[0] // 2, decode_tile(4, 2), size, 0.25, None, None, None, impl

    check_op(op.decode_attention, arguments, [33, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 2, 128), (3, 3, 64), (2, 8, 256)])
def test_on_the_gpu(cuda, dtype, shape):
    heads, group, dim = shape
    lengths = [1, 255, 256, 257, 1000, 0, 13, 512] * 4
    prefixes = [slot % 3 for slot in range(32)]
    args = make(lengths, prefixes, [700, 300, 2], heads=heads, group=group, dim=dim, dtype=dtype,
                capacity=1024, device=cuda)  # fmt: skip
    found, wanted = decode_attention(*args), exact(*args)
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    check(found[:1], wanted[:1], bound)
    check(found[1:], wanted[1:], 1e-4)
    # the same bits alone, and in every run
    for slot in (1, 4, 6):
        alone = [length if s == slot else 0 for s, length in enumerate(lengths)]
        others = tables(prefixes, [(0, 700), (700, 300), (1000, 2)], alone,
                        decode_tile(heads * group, heads), cuda)  # fmt: skip
        again = decode_attention(*args[:5], *others)
        assert torch.equal(again[0][slot], found[0][slot])
        assert torch.equal(again[1][slot], found[1][slot])


def test_bad_input():
    args = make([3, 4], [0, 0], [5])
    with pytest.raises(ValueError, match="window: expected a positive number or None"):
        decode_attention(*args, window=0)
    with pytest.raises(ValueError, match="lengths: expected shape \\(2,\\)"):
        decode_attention(*args[:5], args[5][:1], *args[6:])
    with pytest.raises(ValueError, match="a multiple of 2 heads"):
        decode_attention(args[0][:, :3], *args[1:])
    with pytest.raises(TypeError, match="k: expected float32"):
        decode_attention(args[0], args[1].double(), *args[2:])
    with pytest.raises(ValueError, match="tiles: expected shape \\(2, 3\\)"):
        decode_attention(*args[:9], args[9][:, :1])
