"""Norms and clipped sums of privacy units on a GPU: what the interpreter cannot show."""

import math

import pytest
import torch
from shared_kernels import _autotune
from shared_kernels.ops import dp
from shared_kernels.ops.dp import launch
from shared_kernels.testing import SUM_TOLERANCES, assert_same_bits, assert_sum_within
from shared_kernels.testing.segments import (
    assert_gram_norm,
    assert_mm_norm,
    assert_scaled_sum,
    make_units,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Lengths of the units, d, p.
SHAPES = {
    "smollm2": ([128] * 8, 576, 1536),
    "long": ([2048, 2048], 512, 1024),
    "long and uneven": ([2048, 0, 1, 777, 2047], 255, 129),
    "odd": ([63, 65, 127, 129, 1, 0, 300], 257, 511),
    "many units": ([3, 5] * 500, 64, 96),
    "one column": ([100, 200], 1, 1),
    "one row": ([1], 130, 70),
}


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "1")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def units(request, cuda, dtype):
    return make_units(*request.param, dtype).on(cuda)


@pytest.mark.parametrize("bias", [False, True])
def test_norms(units, bias):
    n2, absolute = dp.segment_gram_norm(units.a, units.g, units.cu, bias=bias)
    assert_gram_norm(units, n2, absolute, bias)
    hinted = dp.segment_gram_norm(units.a, units.g, units.cu, bias=bias, max_seqlen=units.longest)
    assert_gram_norm(units, *hinted, bias)
    assert_mm_norm(units, dp.segment_mm_norm(units.a, units.g, units.cu, bias=bias), bias)


def test_inputs_of_one_sign(cuda, dtype):
    """Partial sums that only grow show a bias of the accumulation; random signs hide it."""
    units = make_units([512, 1024], 1024, 2048, dtype).on(cuda)
    units = units._replace(a=units.a.abs(), g=units.g.abs())
    assert_gram_norm(units, *dp.segment_gram_norm(units.a, units.g, units.cu), bias=False)
    assert_mm_norm(units, dp.segment_mm_norm(units.a, units.g, units.cu), bias=False)
    out, bias_out = units.outputs()
    dp.segment_scaled_mm(units.a, units.g, units.cu, units.scale, out, bias_out=bias_out)
    assert_scaled_sum(units, units.scale, out, bias_out)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
def test_scaled_sum(units, layout):
    out, bias_out = units.outputs(layout)
    dp.segment_scaled_mm(units.a, units.g, units.cu, units.scale, out, bias_out=bias_out)
    assert_scaled_sum(units, units.scale, out, bias_out)


@pytest.mark.parametrize("clipping", ["abadi", "automatic"])
def test_clipped_sum(units, clipping):
    equal = len(units.cu.diff().unique()) == 1
    promises = [{"max_seqlen": units.longest}, *([{"equal": True}] * equal)]
    for options in promises:
        for chunk in (None, 1, 3):
            out, bias_out = units.outputs("transposed")
            n2 = dp.segment_mm_clip(
                units.a,
                units.g,
                units.cu,
                5.0,
                out,
                bias_out=bias_out,
                clipping=clipping,
                chunk=chunk,
                **options,
            )
            assert_mm_norm(units, n2, bias=True)
            assert_scaled_sum(units, dp.clip_factors(n2, 5.0, clipping), out, bias_out)
            over = out.fill_(math.nan)
            options["accumulate"] = False
            n2 = dp.segment_mm_clip(
                units.a, units.g, units.cu, 5.0, over, clipping=clipping, chunk=chunk, **options
            )
            assert_scaled_sum(units, dp.clip_factors(n2, 5.0, clipping), over + 0.5, None)
            del options["accumulate"]


def test_sums(units):
    products, terms = units._replace(g=units.g.double() * units.g.double()).products()
    got = dp.segment_product_sums(units.g, units.g, units.cu)
    tolerance = SUM_TOLERANCES["dp.sums"]
    assert_sum_within(got, products[..., -1], terms[..., -1], tolerance, units.longest)
    products, terms = units.products()
    got = dp.segment_sums(units.g, units.cu)
    assert_sum_within(got, products[..., -1], terms[..., -1], tolerance, units.longest)


def test_embedding(units):
    tokens = units.tokens % 3 * 1000
    n2, absolute = dp.segment_token_gram_norm(tokens, units.g, units.cu, padding_idx=1000)
    out = torch.zeros(2001, units.g.shape[1], device="cuda")
    dp.embedding_accumulate(tokens, units.g, units.cu, units.scale, out, padding_idx=1000)
    expected = torch.zeros(2, len(units.cu) - 1, dtype=torch.float64, device="cuda")
    tables = torch.zeros(2, *out.shape, dtype=torch.float64, device="cuda")
    for unit, (_, g, _) in enumerate(units.units()):
        names = tokens[units.cu[unit] : units.cu[unit + 1]]
        for name in (0, 2000):
            rows = g[names == name]
            gram = rows @ rows.T
            expected[:, unit] += torch.stack([gram.sum(), gram.abs().sum()])
            scale = units.scale[unit].double()
            tables[0, name] += scale * rows.sum(0)
            tables[1, name] += scale * rows.abs().sum(0)
    sizes = (0, units.g.shape[1], units.longest)
    for got, wanted in zip((n2, absolute), expected, strict=True):
        assert_sum_within(
            got, wanted, expected[1], SUM_TOLERANCES["dp.gram"], *sizes, operands=units.g
        )
    assert_sum_within(out, *tables, SUM_TOLERANCES["dp.sums"], len(units.g))


def everything(units, longest):
    """Call every function and return all results."""
    a, g, cu, tokens, scale = units
    out, bias_out = units.outputs()
    clipped, bias_clipped = units.outputs()
    table = torch.zeros(6, g.shape[1], device="cuda")
    results = [
        *dp.segment_gram_norm(a, g, cu, bias=True),
        *dp.segment_token_gram_norm(tokens, g, cu),
        dp.segment_mm_norm(a, g, cu, bias=True),
        dp.segment_mm_clip(a, g, cu, 1.0, clipped, bias_out=bias_clipped, max_seqlen=longest),
        dp.segment_sums(g, cu),
        dp.segment_product_sums(g, g, cu),
    ]
    dp.segment_scaled_mm(a, g, cu, scale, out, bias_out=bias_out)
    dp.embedding_accumulate(tokens, g, cu, scale, table)
    return [*results, out, bias_out, clipped, bias_clipped, table]


def test_twice_the_same_bits(units):
    for x, y in zip(*(everything(units, units.longest) for _ in range(2)), strict=True):
        assert_same_bits(x, y)


def test_nothing_waits_for_the_device(cuda, dtype):
    units = make_units([70, 0, 300], 65, 33, dtype).on(cuda)
    everything(units, 300)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = everything(units, 300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(result.isfinite().all()) for result in results)


@pytest.mark.parametrize("width", [2, 4])
def test_every_configuration_is_right(cuda, monkeypatch, width):
    dtype = torch.bfloat16 if width == 2 else torch.float32
    units = make_units([300, 0, 129], 200, 150, dtype).on(cuda)
    for config in launch.GRAM_CONFIGS[width]:
        monkeypatch.setitem(launch.GRAM_CONFIGS, width, (config,))
        assert_gram_norm(units, *dp.segment_gram_norm(units.a, units.g, units.cu), bias=False)
    for config in launch.PRODUCT_CONFIGS[width]:
        monkeypatch.setitem(launch.PRODUCT_CONFIGS, width, (config,))
        assert_mm_norm(units, dp.segment_mm_norm(units.a, units.g, units.cu), bias=False)
        out, _ = units.outputs()
        dp.segment_scaled_mm(units.a, units.g, units.cu, units.scale, out)
        assert_scaled_sum(units, units.scale, out)


def test_tuning_adds_to_the_output_once(cuda, monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "full")
    monkeypatch.setattr(_autotune, "_measured", {})
    units = make_units([64] * 4, 4096, 2048, torch.bfloat16).on(cuda)
    for _ in range(2):
        out, _ = units.outputs()
        dp.segment_scaled_mm(units.a, units.g, units.cu, units.scale, out)
        assert_scaled_sum(units, units.scale, out)
    assert len(_autotune._measured) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_that_hold_nan_do_not_spread(cuda, dtype):
    units = make_units([100, 200, 100], 130, 70, dtype).on(cuda)
    expected = dp.segment_gram_norm(units.a, units.g, units.cu)[0]
    a, g = units.a.clone(), units.g.clone()
    a[100:300], g[100:300] = float("nan"), float("inf")
    n2 = dp.segment_gram_norm(a, g, units.cu)[0]
    assert_same_bits(n2[::2], expected[::2])
    assert bool(n2[1].isnan())
    scale = units.scale.clone()
    scale[1] = 0
    out, bias_out = units.outputs()
    dp.segment_scaled_mm(a, g, units.cu, scale, out, bias_out=bias_out)
    assert_scaled_sum(units, scale, out, bias_out)
    out, bias_out = units.outputs()
    n2 = dp.segment_mm_clip(a, g, units.cu, 1.0, out, bias_out=bias_out, max_seqlen=200)
    assert n2.isfinite().tolist() == [True, False, True]
    assert_scaled_sum(units, dp.clip_factors(n2, 1.0), out, bias_out)


def test_a_peak_of_memory_that_does_not_grow_with_the_units(cuda):
    """Norms and the scaled sum keep no product and no Gram matrix of a unit."""
    peaks = []
    for count in (4, 32):
        units = make_units([512] * count, 1024, 1024, torch.bfloat16).on(cuda)
        out, _ = units.outputs()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dp.segment_gram_norm(units.a, units.g, units.cu)
        dp.segment_mm_norm(units.a, units.g, units.cu)
        dp.segment_scaled_mm(units.a, units.g, units.cu, units.scale, out)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # parts of the sum: at most 264 tiles of 128 x 128, whatever the number of units
    assert peaks[1] < 2 * 264 * 128 * 128 * 4


def test_capture_in_a_graph(cuda):
    units = make_units([64, 0, 200], 96, 160, torch.bfloat16).on(cuda)
    out, expected = units.outputs()[0], units.outputs()[0]

    def step(out):
        n2, _ = dp.segment_gram_norm(units.a, units.g, units.cu)
        dp.segment_scaled_mm(units.a, units.g, units.cu, dp.clip_factors(n2, 1.0), out)

    step(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(out)
    out.fill_(0.5)
    graph.replay()
    assert_same_bits(out, expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(cuda):
    rows = (1 << 19) + 5
    lengths = [rows - 300, 300]
    a = torch.zeros(rows, 4100, dtype=torch.bfloat16, device=cuda)
    g = torch.zeros(rows, 130, dtype=torch.bfloat16, device=cuda)
    tail = make_units([300], 4100, 130, torch.bfloat16).on(cuda)
    a[-300:], g[-300:] = tail.a, tail.g
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(cuda)
    assert_mm_norm(tail, dp.segment_mm_norm(a, g, cu)[1:], bias=False)
    out, bias_out = tail.outputs()
    scale = torch.ones(2, device=cuda)
    dp.segment_scaled_mm(a, g, cu, scale, out, bias_out=bias_out)
    assert_scaled_sum(tail, scale[1:], out, bias_out)
    n2, absolute = dp.segment_gram_norm(
        a[rows - 1000 :], g[rows - 1000 :], cu.sub(rows - 1000).clamp_(0)
    )
    assert_gram_norm(tail, n2[1:], absolute[1:], bias=False)
