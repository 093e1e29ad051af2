"""zo_materialize and zo_replay: every implementation against the definition, and the identities."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.zo import (
    TILE,
    Perturbation,
    Segment,
    build_tile_table,
    zo_materialize,
    zo_replay,
)
from shared_kernels.ops.zo.op import zo_materialize_
from shared_kernels.random import noise
from shared_kernels.testing import TOLERANCES, assert_same_bits, assert_within, check_op
from torch import Tensor

SEGMENTS = [
    Segment(1, 5000, True),
    Segment(0xFFFFFFF0, TILE, False, 2 * TILE),
    Segment(3, 1, True, TILE << 30),
]
PERTURB = Perturbation(seed=(1 << 63) + 7, direction=2, eps=1e-3)
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
STORES = ["fp32", "bf16", "bf16x2"]


class Buffers(NamedTuple):
    """A flat buffer with everything the op takes, and its outputs."""

    master: Tensor
    lo: Tensor | None
    tiles: Tensor
    keys: Tensor
    coefs: Tensor
    plus: Tensor | None
    minus: Tensor | None

    def run(self, **options: Any) -> "Buffers":
        zo_materialize(
            self.master,
            self.tiles,
            self.keys,
            self.coefs,
            lo=self.lo,
            plus=self.plus,
            minus=self.minus,
            **options,
        )
        return self

    def written(self) -> Iterator[Tensor]:
        return (t for t in (self.master, self.lo, self.plus, self.minus) if t is not None)


def make(
    store="fp32", records=0, segments=SEGMENTS, outs=(F32, BF16), device="cpu", seed=0, special=True
) -> Buffers:
    """Make equal buffers for equal arguments; outputs begin as NaN."""
    g = torch.Generator().manual_seed(seed)
    tiles = build_tile_table(segments)
    numel = tiles.shape[0] * TILE
    y = torch.randn(numel, generator=g) * 0.02
    if special and numel:
        y[:4] = torch.tensor([float("inf"), -0.0, 1e-42, 3.4e38])
    valid = torch.arange(TILE) < tiles[:, 3:4]
    # NaN shows that padding was read, a number that it was written
    padding = torch.tensor([float("nan"), 3.0]).repeat(numel // 2)
    y = torch.where(valid.view(-1), y, padding)
    lo = None
    if store != "fp32":
        y = y.bfloat16()
    if store == "bf16x2":
        lo = torch.randint(-(1 << 15), 1 << 15, (numel,), generator=g).to(torch.int16)
    keys = torch.randint(-(1 << 31), 1 << 31, (records, 3), generator=g).to(torch.int32)
    keys[:, 2] &= 0xFFFFFF
    coefs = torch.randn(records, 2, generator=g) * 0.01
    coefs[:, 0] += 1
    plus, minus = (
        None if dtype is None else torch.full((numel,), float("nan"), dtype=dtype) for dtype in outs
    )
    tensors = (y, lo, tiles, keys, coefs, plus, minus)
    return Buffers(*(t if t is None else t.to(device) for t in tensors))


CASES = [
    (store, dist, fold, rounding)
    for store, dist, (fold, rounding) in itertools.product(
        STORES,
        ["gaussian", "rademacher"],
        [(False, "nearest"), (True, "nearest"), (True, "stochastic")],
    )
    if rounding == "nearest" or store == "bf16"
]
OUTPUTS = [
    ((F32, BF16), PERTURB),
    ((FP16, None), PERTURB),
    ((BF16, None), None),
    ((None,) * 2, None),
]


@pytest.mark.parametrize("records", [0, 1, 3, 33])
@pytest.mark.parametrize(("store", "dist", "fold", "rounding"), CASES)
def test_numba_is_the_reference(store, dist, fold, rounding, records):
    for outs, perturb in OUTPUTS if records < 33 else OUTPUTS[:1]:
        options = {
            "perturb": perturb,
            "fold": fold,
            "rounding": rounding,
            "dither_seed": -9,
            "dist": dist,
        }
        got = make(store, records, outs=outs).run(impl="numba", **options)
        expected = make(store, records, outs=outs).run(impl="reference", **options)
        for a, b in zip(got.written(), expected.written(), strict=True):
            assert_same_bits(a, b)


def zo_tolerance(tensor: Tensor, device: str):
    if device != "cpu" or not tensor.is_floating_point():
        return TOLERANCES["zo_materialize"]
    return TOLERANCES[
        "zo_materialize.float32/interpreter"
        if tensor.dtype == F32
        else "zo_materialize.16bit/interpreter"
    ]


@pytest.mark.parametrize("records", [0, 3])
@pytest.mark.parametrize(("store", "dist", "fold", "rounding"), CASES)
def test_triton_is_the_reference(kernel_device, store, dist, fold, rounding, records):
    one = OUTPUTS[(records + fold) % len(OUTPUTS)]
    for outs, perturb in OUTPUTS if kernel_device == "cuda" else [one]:
        options = {
            "perturb": perturb,
            "fold": fold,
            "rounding": rounding,
            "dither_seed": -9,
            "dist": dist,
        }
        # 1e-42 and 3.4e38 would measure the interpreter's truncation, not the kernel
        special = kernel_device == "cuda"
        got = make(store, records, outs=outs, device=kernel_device, special=special)
        got.run(impl="triton", **options)
        expected = make(store, records, outs=outs, special=special).run(impl="reference", **options)
        for a, b in zip(got.written(), expected.written(), strict=True):
            if a.dtype == torch.int16:
                assert torch.equal(a.cpu(), b)
            else:
                assert_within(a.cpu(), b, zo_tolerance(a, kernel_device))


def test_triton_rademacher_is_exact_even_interpreted(kernel_device):
    options = {"perturb": PERTURB, "fold": True, "dist": "rademacher"}
    got = make("fp32", 2, outs=(F32, F32), device=kernel_device, special=False)
    got.run(impl="triton", **options)
    expected = make("fp32", 2, outs=(F32, F32), special=False).run(impl="reference", **options)
    for a, b in zip(got.written(), expected.written(), strict=True):
        assert_same_bits(a.cpu(), b)


def test_triton_stochastic_rounding_is_exact_even_interpreted(kernel_device):
    """The tolerance of one ulp elsewhere would hide a wrong dither altogether."""
    options = {
        "perturb": None,
        "fold": True,
        "dist": "rademacher",
        "rounding": "stochastic",
        "dither_seed": -9,
    }
    got = make("bf16", 2, outs=(None, None), device=kernel_device).run(impl="triton", **options)
    expected = make("bf16", 2, outs=(None, None)).run(impl="reference", **options)
    assert_same_bits(got.master.cpu(), expected.master)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(0, 9000), min_size=0, max_size=4),
    records=st.integers(0, 3),
    store=st.sampled_from(STORES),
    dist=st.sampled_from(["gaussian", "rademacher"]),
)
def test_numba_is_the_reference_on_any_segments(sizes, records, store, dist):
    segments = [Segment(i * 0x3FFFFFFF, n, i % 2 == 0, i * TILE) for i, n in enumerate(sizes)]
    options = {"perturb": PERTURB, "fold": True, "dist": dist}
    got = make(store, records, segments).run(impl="numba", **options)
    expected = make(store, records, segments).run(impl="reference", **options)
    for a, b in zip(got.written(), expected.written(), strict=True):
        assert_same_bits(a, b)


# --- what the definition means, spelled out with the public noise function ----------------------


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_formula_in_numpy(impl, dist):
    segment = Segment(uid=77, numel=5000, decay=True)
    b = make("fp32", 3, [segment, segment._replace(uid=78, decay=False)], special=False)
    before = b.master.clone()
    b.run(perturb=PERTURB, fold=True, dist=dist, impl=impl)
    for offset, uid, decay in ((0, 77, True), (2 * TILE, 78, False)):
        y = before[offset : offset + 5000].numpy().copy()
        for (low, high, k), (a, c) in zip(b.keys.tolist(), b.coefs.numpy(), strict=True):
            seed = (low & 0xFFFFFFFF) | (high << 32)
            z = noise(5000, seed=seed, uid=uid, direction=k, dist=dist).numpy()
            y = (a * y if decay else y) - c * z
        z = noise(5000, seed=PERTURB.seed, uid=uid, direction=2, dist=dist)
        t = torch.tensor(PERTURB.eps, dtype=F32) * z
        y = torch.from_numpy(y)
        assert_same_bits(b.master[offset : offset + 5000], y)
        assert_same_bits(b.plus[offset : offset + 5000], y + t)
        assert_same_bits(b.minus[offset : offset + 5000], (y - t).bfloat16())


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_padding_is_zero_in_outputs_and_kept_in_the_master(impl):
    for store in STORES:
        b = make(store, 1, special=False)
        before = [t.clone() for t in (b.master, b.lo) if t is not None]
        b.run(perturb=PERTURB, fold=True, impl=impl)
        padding = torch.arange(TILE) >= b.tiles[:, 3:4]
        padding = padding.view(-1)
        assert int(padding.sum()) > 0
        for out in (b.plus, b.minus):
            assert bool((out[padding] == 0).all())
            assert bool(out[~padding].isfinite().all())
        for old, new in zip(before, (b.master, b.lo), strict=False):
            bits = lambda t: t.view(torch.int32 if t.dtype == F32 else torch.int16)  # noqa: E731
            assert torch.equal(bits(old)[padding], bits(new)[padding])


@pytest.mark.parametrize("store", STORES)
def test_without_fold_the_master_is_untouched(store):
    b = make(store, 3)
    before = make(store, 3)
    b.run(perturb=PERTURB)
    assert_same_bits(b.master, before.master)
    if b.lo is not None:
        assert torch.equal(b.lo, before.lo)


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("store", ["fp32", "bf16x2"])
@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_replay_in_one_go_is_stepwise_replay(impl, store, dist):
    at_once = make(store, 33, outs=(None, None))
    zo_replay(
        at_once.master,
        at_once.tiles,
        at_once.keys,
        at_once.coefs,
        lo=at_once.lo,
        dist=dist,
        impl=impl,
    )
    stepwise = make(store, 33, outs=(None, None))
    for first, last in ((0, 1), (1, 2), (2, 20), (20, 20), (20, 33)):
        zo_replay(
            stepwise.master,
            stepwise.tiles,
            stepwise.keys[first:last].contiguous(),
            stepwise.coefs[first:last].contiguous(),
            lo=stepwise.lo,
            dist=dist,
            impl=impl,
        )
    for a, b in zip(at_once.written(), stepwise.written(), strict=True):
        assert_same_bits(a, b)


def test_replay_of_a_thousand_records():
    got = make("fp32", 1000, SEGMENTS[:1], (None, None), special=False)
    expected = make("fp32", 1000, SEGMENTS[:1], (None, None), special=False)
    zo_replay(got.master, got.tiles, got.keys, got.coefs, dist="rademacher")
    zo_replay(
        expected.master,
        expected.tiles,
        expected.keys,
        expected.coefs,
        dist="rademacher",
        impl="reference",
    )
    assert_same_bits(got.master, expected.master)


@pytest.mark.parametrize("store", STORES)
def test_a_slice_is_part_of_the_whole(store):
    whole = make(store, 2, [Segment(9, 4 * TILE, True)])
    part = Buffers(
        *(None if t is None else t[TILE : 3 * TILE].clone() for t in whole[:2]),
        build_tile_table([Segment(9, 2 * TILE, True, start=TILE)]),
        *whole[3:5],
        *(t[TILE : 3 * TILE].clone() for t in whole[5:]),
    )
    options = {"perturb": PERTURB, "fold": True}
    whole.run(**options)
    part.run(**options)
    for a, b in zip(part.written(), whole.written(), strict=True):
        assert_same_bits(a, b[TILE : 3 * TILE])


def test_order_of_segments_and_threads_do_not_matter():
    segments = [Segment(uid, 40 * TILE, uid % 2 == 0) for uid in range(4)]
    forward = make("fp32", 2, segments).run(perturb=PERTURB)
    backward = make("fp32", 2, segments)
    order = torch.arange(160).view(4, 40).flip(0).flatten()
    flip = lambda t: t.view(160, -1)[order].reshape(t.shape)  # noqa: E731
    backward = backward._replace(master=flip(backward.master), tiles=flip(backward.tiles))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        backward.run(perturb=PERTURB)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(flip(backward.plus), forward.plus)
    assert_same_bits(flip(backward.minus), forward.minus)


def test_no_tiles():
    b = make("fp32", 1, []).run(perturb=PERTURB, fold=True)
    assert b.plus.shape == (0,)


# --- the op and its arguments -------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_op_checklist(impl):
    def make_args(numel):
        b = make("bf16x2", 2, [Segment(5, numel, True)], special=False)
        return *b, True, -3, 1, 1e-3, True, False, 0, "gaussian", impl

    check_op(zo_materialize_, make_args, sizes=[TILE + 1, 0, 1, TILE - 1, 4099])


def test_op_checklist_interpreted(kernel_device):
    def make_args(numel):
        b = make("fp32", 1, [Segment(5, numel, True)], (F32, F32), kernel_device, special=False)
        return *b, True, -3, 1, 1e-3, True, False, 0, "gaussian", "triton"

    check_op(zo_materialize_, make_args, sizes=[97, TILE])


BAD = {
    "master dtype": (
        lambda b: b._replace(master=b.master.half()),
        {},
        TypeError,
        r"master: expected float32 or bfloat16, got float16 \(16384,\) on cpu",
    ),
    "master size": (
        lambda b: b._replace(master=b.master[:-1].clone()),
        {},
        ValueError,
        "master: expected 4 tiles x 4096 = 16384 elements.*pad each segment",
    ),
    "master layout": (
        lambda b: b._replace(master=torch.zeros(2 * len(b.master))[::2]),
        {},
        ValueError,
        r"master: expected a contiguous tensor.*strides \(2,\)",
    ),
    "master autograd": (
        lambda b: b._replace(master=torch.zeros(len(b.master), requires_grad=True)),
        {},
        ValueError,
        "master: expected a tensor outside autograd.*detach",
    ),
    "tiles": (lambda b: b._replace(tiles=b.tiles.long()), {}, TypeError, "tiles: expected int32"),
    "keys": (
        lambda b: b._replace(keys=b.keys[:, :2].contiguous()),
        {},
        ValueError,
        r"keys: expected shape \(any, 3\)",
    ),
    "coefs": (
        lambda b: b._replace(coefs=b.coefs[:1]),
        {},
        ValueError,
        r"coefs: expected shape \(2, 2\), got float32 \(1, 2\)",
    ),
    "plus": (
        lambda b: b._replace(plus=b.plus.double()),
        {},
        TypeError,
        "plus: expected float32 or bfloat16 or float16, got float64",
    ),
    "minus": (
        lambda b: b._replace(minus=b.minus[:-4096].clone()),
        {},
        ValueError,
        r"minus: expected shape \(16384,\), got bfloat16 \(12288,\) on cpu",
    ),
    "minus alone": (lambda b: b, {"perturb": None}, ValueError, "minus: expected None without"),
    "lo with fp32": (
        lambda b: b._replace(lo=torch.zeros(len(b.master), dtype=torch.int16)),
        {},
        TypeError,
        "master: expected bfloat16 beside lo",
    ),
    "lo dtype": (lambda b: b._replace(lo=b.master.clone()), {}, TypeError, "lo: expected int16"),
    "stochastic fp32": (
        lambda b: b,
        {"fold": True, "rounding": "stochastic"},
        ValueError,
        "rounding: expected 'nearest'",
    ),
    "rounding": (lambda b: b, {"rounding": "up"}, ValueError, "one of nearest, stochastic"),
    "dist": (lambda b: b, {"dist": "normal"}, ValueError, "one of gaussian, rademacher"),
    "eps": (
        lambda b: b,
        {"perturb": Perturbation(0, 0, float("nan"))},
        ValueError,
        "perturb.eps: expected a finite float32, got nan",
    ),
    "eps overflow": (
        lambda b: b,
        {"perturb": Perturbation(0, 0, 1e300)},
        ValueError,
        "perturb.eps: expected a finite float32",
    ),
    "direction": (
        lambda b: b,
        {"perturb": Perturbation(0, 1 << 24, 1e-3)},
        ValueError,
        "perturb.direction: expected an integer in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, options, error, message = BAD[case]
    b = change(make("fp32", 2))
    with pytest.raises(error, match=message):
        b.run(**{"perturb": PERTURB, **options})


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(-1, 4, True), r"segments\[1\].uid: expected an integer in \[0, 4294967296\)"),
        (Segment(1, -4, True), r"segments\[1\].numel"),
        (Segment(1, 4, True, 100), r"segments\[1\].start: expected a multiple of 4096, got 100"),
    ],
)
def test_bad_segments(segment, message):
    with pytest.raises(ValueError, match=message):
        build_tile_table([Segment(1, 4, True), segment])


def test_tile_table():
    assert build_tile_table([*SEGMENTS, Segment(4, 0, True)]).tolist() == [
        [1, 0, 0, 4096, 1],
        [1, 4096, 0, 904, 1],
        [-16, 8192, 0, 4096, 0],
        [3, 0, 1024, 1, 1],
    ]
    assert build_tile_table([]).shape == (0, 5)
    high = build_tile_table([Segment(1, 1, False, 0xFFFFF000)])
    assert high.tolist() == [[1, -4096, 0, 1, 0]]
