"""Kernels over tensor descriptors: units of whole blocks of rows, matrices that are aligned."""

import math

import pytest
import torch
from shared_kernels.ops import dp
from shared_kernels.ops.dp import launch, wide
from shared_kernels.testing import assert_same_bits
from shared_kernels.testing.segments import (
    assert_gram_norm,
    assert_mm_norm,
    assert_scaled_sum,
    make_units,
)

#: Lengths of the units, d, p: below a block, one, and more; no rows; the wide side either way.
SHAPES = {
    "one block": ([16], 8, 16),
    "empty units": ([0, 32, 0, 16, 64, 0], 40, 24),
    "wide inputs": ([64, 128, 64], 264, 136),
    "wide outputs": ([48, 16, 80], 24, 280),
    "equal": ([64] * 4, 128, 256),
}
WHERE = [
    *(pytest.param((dtype, False), id=f"interpreter-{dtype}") for dtype in (torch.bfloat16,)),
    *(
        pytest.param((dtype, True), id=f"cuda-{dtype}", marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16)
    ),
]


@pytest.fixture(params=WHERE)
def place(request):
    """Dtype and device."""
    dtype, on_gpu = request.param
    if on_gpu != torch.cuda.is_available():
        pytest.skip("runs interpreted or on a GPU, not both in one process")
    if on_gpu and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper or later")
    pytest.importorskip("triton")
    return dtype, "cuda" if on_gpu else "cpu"


@pytest.fixture(params=SHAPES)
def case(request, place):
    """Units of one shape."""
    return make_units(*SHAPES[request.param], place[0]).on(place[1])


@pytest.fixture(autouse=True)
def only_these(monkeypatch):
    """The kernels for other layouts must not be what is tested."""
    monkeypatch.setattr(launch, "GRAM_CONFIGS", {})
    monkeypatch.setattr(launch, "PRODUCT_CONFIGS", {})


@pytest.mark.parametrize("bias", [False, True])
def test_norms(case, bias):
    assert_gram_norm(
        case, *dp.segment_gram_norm(case.a, case.g, case.cu, bias=bias, impl="triton"), bias
    )
    n2 = dp.segment_mm_norm(case.a, case.g, case.cu, bias=bias, row_multiple=16, impl="triton")
    assert_mm_norm(case, n2, bias)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_token_norm_is_the_reference_s(case, padding_idx):
    options = {"padding_idx": padding_idx}
    got = dp.segment_token_gram_norm(case.tokens, case.g, case.cu, impl="triton", **options)
    want = dp.segment_token_gram_norm(
        case.tokens.cpu(), case.g.cpu(), case.cu.cpu(), impl="reference", **options
    )
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("wave", [1, 132])
def test_scaled_sum(case, layout, wave, monkeypatch):
    """In one part, and in as many as units."""
    monkeypatch.setattr(wide, "ONE_WAVE", wave)
    out, bias_out = case.outputs(layout)
    dp.segment_scaled_mm(
        case.a, case.g, case.cu, case.scale, out, bias_out=bias_out, row_multiple=16, impl="triton"
    )
    assert_scaled_sum(case, case.scale, out, bias_out)


SCALES = {
    "rising": [0.1, 0.2, 0.4, 0.8],
    "falling": [0.8, 0.4, 0.2, 0.1],
    "equal": [0.5] * 4,
    "signs": [-0.5, 0.5, -0.1, 2.0],
    "far apart": [1e-30, 1.0, 1e-38, 1e-10],
    "below the normal numbers": [1e-42, 1e-44, 1.0, 1e-40],
    "some zero": [0.0, 0.3, 0.0, 0.2],
    "one": [0.0, 0.0, 0.7, 0.0],
    "all zero": [0.0] * 4,
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_any_scales(place, scale):
    """The sum is rescaled from unit to unit; rows of a unit with scale 0 may be anything."""
    dtype, device = place
    units = make_units([64, 16, 48, 32], 24, 40, dtype)
    units = units._replace(scale=torch.tensor(scale))
    bad = units.scale.repeat_interleave(units.cu.diff()) == 0
    clean = units._replace(a=units.a.masked_fill(bad[:, None], 0.0))
    units = units._replace(a=units.a.masked_fill(bad[:, None], float("nan"))).on(device)
    out = torch.zeros(40, 24, device=device)
    dp.segment_scaled_mm(
        units.a, units.g, units.cu, units.scale, out, row_multiple=16, impl="triton"
    )
    assert_scaled_sum(clean, clean.scale, out + 0.5, None)


def test_a_unit_of_nan_stays_alone(place):
    """Tiles reach into the next unit's rows; its NaN must not."""
    dtype, device = place
    units = make_units([16, 40, 24], 16, 8, dtype)
    rows = torch.arange(80)[:, None]
    bad = (rows >= 16) & (rows < 56)
    units = units._replace(a=units.a.masked_fill(bad, float("nan"))).on(device)
    n2, absolute = dp.segment_gram_norm(units.a, units.g, units.cu, impl="triton")
    assert n2.isfinite().tolist() == absolute.isfinite().tolist() == [True, False, True]


def test_a_broken_promise_is_nan(place):
    dtype, device = place
    if device == "cpu":
        units = make_units([16, 24, 8], 16, 16, dtype)
        with pytest.raises(ValueError, match="multiples of 16"):
            dp.segment_mm_norm(units.a, units.g, units.cu, row_multiple=16)
        return
    units = make_units([16, 24, 8], 16, 16, dtype).on(device)
    assert dp.segment_mm_norm(units.a, units.g, units.cu, row_multiple=16).isnan().all()
    out, _ = units.outputs()
    dp.segment_scaled_mm(units.a, units.g, units.cu, units.scale, out, row_multiple=16)
    assert out.isnan().all()


@pytest.mark.parametrize("clipping", ["abadi", "automatic"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_clipped_sum(place, clipping, chunk, monkeypatch):
    """Norms taken while the products are written; a last chunk with fewer units."""
    dtype, device = place
    monkeypatch.setattr(launch, "_products", None)
    units = make_units([32] * 5, 264, 136, dtype).on(device)
    for layout in ("contiguous", "transposed", "gaps"):
        out, bias_out = units.outputs(layout)
        options = {"clipping": clipping, "chunk": chunk, "equal": True, "impl": "triton"}
        n2 = dp.segment_mm_clip(units.a, units.g, units.cu, 90.0, out, bias_out=bias_out, **options)
        assert_mm_norm(units, n2, bias=True)
        assert_scaled_sum(units, dp.clip_factors(n2, 90.0, clipping), out, bias_out)
        over = out.fill_(math.nan)
        options["accumulate"] = False
        n2 = dp.segment_mm_clip(units.a, units.g, units.cu, 90.0, over, **options)
        assert_scaled_sum(units, dp.clip_factors(n2, 90.0, clipping), over + 0.5, None)


@pytest.mark.parametrize("clipping", ["abadi", "automatic"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_clipped_sum_by_gram_norms_is_its_parts(case, clipping, layout):
    """One call gives what its four parts give; the last number of parts of sums is uneven."""
    out, _ = case.outputs(layout)
    options = {"row_multiple": 16, "impl": "triton"}
    n2 = dp.segment_gram_clip(case.a, case.g, case.cu, 90.0, out, clipping=clipping, **options)
    sums = dp.segment_gram_norm(case.a, case.g, case.cu, impl="triton")
    expected = dp.certified_norm(*sums, case.cu, case.a.shape[1], case.g.shape[1])
    torch.testing.assert_close(n2, expected, rtol=1e-5, atol=1e-3)
    assert_scaled_sum(case, dp.clip_factors(n2, 90.0, clipping), out)


def test_many_units(place):
    """More units than a rank is compared with at a time, some not finite, some of one size."""
    dtype, device = place
    units = make_units([16] * 77, 16, 24, dtype)
    # what a unit is scaled by decides its factor
    size = torch.tensor([1.0, 30.0, 0.01, 300.0, float("nan"), 3.0, 1.0])[torch.arange(77) % 7]
    size = size.repeat_interleave(16)[:, None].to(dtype)
    units = units._replace(a=units.a * size).on(device)
    out, _ = units.outputs()
    options = {"row_multiple": 16, "impl": "triton"}
    n2 = dp.segment_gram_clip(units.a, units.g, units.cu, 90.0, out, **options)
    assert n2.isfinite().tolist() == [i % 7 != 4 for i in range(77)]
    finite = units._replace(a=units.a.nan_to_num(0.0))
    assert_scaled_sum(finite, dp.clip_factors(n2, 90.0), out)


def test_twice_the_same_bits(case):
    outs = []
    for _ in range(2):
        out, _ = case.outputs()
        dp.segment_scaled_mm(
            case.a, case.g, case.cu, case.scale, out, row_multiple=16, impl="triton"
        )
        outs.append(out)
    assert_same_bits(*outs)
