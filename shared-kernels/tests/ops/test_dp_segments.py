"""Norms and clipped sums of privacy units: every implementation against a loop in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops import dp
from shared_kernels.testing import (
    SUM_TOLERANCES,
    assert_same_bits,
    assert_sum_within,
    poisoned_empty,
)
from shared_kernels.testing.segments import (
    UnitRows,
    assert_gram_norm,
    assert_mm_norm,
    assert_scaled_sum,
    make_units,
)
from torch import Tensor

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: Lengths of the units, d, p. Blocks are 32 to 128 wide.
SHAPES = {
    "empty units": ([0, 3, 0, 7, 7, 7, 1, 0], 5, 9),
    "equal": ([16] * 4, 8, 24),
    "single rows": ([1] * 5, 3, 2),
    "around a block": ([64, 65, 129], 33, 65),
    "long": ([300, 2], 17, 31),
    "narrow": ([4, 4], 1, 1),
    "no rows": ([0, 0], 4, 4),
    "no units": ([], 4, 4),
}


#: Implementation, dtype, where it runs, and whether on all shapes or on a few.
VARIANTS = [
    *(("reference", dtype, "cpu", True) for dtype in (F64, F32, BF16)),
    *(("triton", dtype, "interpreter", dtype == F32) for dtype in (F32, BF16, FP16)),
    *(
        pytest.param(("triton", dtype, "cuda", True), marks=pytest.mark.gpu)
        for dtype in (F32, BF16, FP16)
    ),
]
FEW_SHAPES = ("empty units", "around a block")


def name(value) -> str:
    """Name a parameter of a test."""
    return "-".join(
        str(part).removeprefix("torch.") for part in value if not isinstance(part, bool)
    )


def device_of(variant) -> str:
    """Return where a variant runs, or skip."""
    where = variant[2]
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if where == "interpreter":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled for the GPU in this process")
    return "cuda" if where == "cuda" else "cpu"


@pytest.fixture(params=VARIANTS, ids=name)
def variant(request):
    """Implementation, dtype and device."""
    return *request.param[:2], device_of(request.param)


def _with_shapes():
    for entry in VARIANTS:
        marks = getattr(entry, "marks", ())
        (values,) = getattr(entry, "values", (entry,))
        for shape in SHAPES if values[3] else FEW_SHAPES:
            yield pytest.param((*values, shape), marks=marks)


@pytest.fixture(params=_with_shapes(), ids=name)
def run(request):
    """Units on the device of a variant, and the implementation to ask for."""
    impl, dtype, _, _, shape = request.param
    return make_units(*SHAPES[shape], dtype).on(device_of(request.param)), impl


@pytest.mark.parametrize("bias", [False, True])
def test_gram_norm(run, bias):
    case, impl = run
    n2, absolute = dp.segment_gram_norm(case.a, case.g, case.cu, bias=bias, impl=impl)
    assert_gram_norm(case, n2, absolute, bias)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_token_gram_norm(run, padding_idx):
    case, impl = run
    for tokens in (case.tokens, case.tokens.int()):
        n2, absolute = dp.segment_token_gram_norm(
            tokens, case.g, case.cu, padding_idx=padding_idx, impl=impl
        )
        expected = case.a.new_zeros(2, len(case.cu) - 1, dtype=F64)
        for unit, (_, g, names) in enumerate(case.units()):
            same = (names[:, None] == names) & (names != (padding_idx or -1))
            expected[:, unit] = torch.stack([(g @ g.T)[same].sum(), (g @ g.T)[same].abs().sum()])
        sizes = (0, case.g.shape[1], case.longest)
        for got, wanted in zip((n2, absolute), expected, strict=True):
            assert_sum_within(
                got, wanted, expected[1], SUM_TOLERANCES["dp.gram"], *sizes, operands=case.g
            )


def test_padding_rows_may_hold_anything(variant):
    impl, dtype, device = variant
    case = make_units([5, 40], 3, 9, dtype).on(device)
    poisoned = case.g.clone()
    poisoned[case.tokens == 2] = float("nan")
    options = {"padding_idx": 2, "impl": impl}
    for g in (case.g, poisoned):
        n2, _ = dp.segment_token_gram_norm(case.tokens, g, case.cu, **options)
        out = torch.zeros(6, 9, dtype=case.dtype, device=device)
        dp.embedding_accumulate(case.tokens, g, case.cu, case.scale, out, **options)
        if g is case.g:
            expected = n2, out
    assert_same_bits(n2, expected[0])
    assert_same_bits(out, expected[1])


@pytest.mark.parametrize("bias", [False, True])
def test_mm_norm(run, bias):
    case, impl = run
    n2 = dp.segment_mm_norm(case.a, case.g, case.cu, bias=bias, impl=impl)
    assert_mm_norm(case, n2, bias)


def test_scaled_mm(run):
    case, impl = run
    for layout in ("contiguous", "transposed", "gaps"):
        out, bias_out = case.outputs(layout)
        bias_out = None if layout == "contiguous" else bias_out
        dp.segment_scaled_mm(case.a, case.g, case.cu, case.scale, out, bias_out=bias_out, impl=impl)
        assert_scaled_sum(case, case.scale, out, bias_out)


def test_scaled_mm_in_parts_of_the_rows(kernel_device, monkeypatch):
    monkeypatch.setattr("shared_kernels.ops.dp.launch._SPLIT_ROWS", 10)
    for lengths in ([16, 0, 40, 1, 0, 30], [87], [1] * 33, [0, 0, 50, 0]):
        case = make_units(lengths, 20, 12).on(kernel_device)
        out, bias_out = case.outputs("transposed")
        dp.segment_scaled_mm(
            case.a, case.g, case.cu, case.scale, out, bias_out=bias_out, impl="triton"
        )
        assert_scaled_sum(case, case.scale, out, bias_out)


CLIPS = [("abadi", 2.0), ("automatic", 2.0), ("abadi", float("inf"))]


@pytest.mark.parametrize(("clipping", "threshold"), CLIPS)
def test_mm_clip(run, clipping, threshold):
    case, impl = run
    equal = len(set(case.cu.diff().tolist())) == 1
    for options in [{"equal": True}] * equal + [{"max_seqlen": case.longest, "chunk": 3}]:
        out, bias_out = case.outputs("transposed")
        n2 = dp.segment_mm_clip(
            case.a,
            case.g,
            case.cu,
            threshold,
            out,
            bias_out=bias_out,
            clipping=clipping,
            impl=impl,
            **options,
        )
        assert_mm_norm(case, n2, bias=True)
        assert_scaled_sum(case, dp.clip_factors(n2, threshold, clipping), out, bias_out)
        alone, _ = case.outputs()
        n2 = dp.segment_mm_clip(case.a, case.g, case.cu, threshold, alone, impl=impl, **options)
        assert_mm_norm(case, n2, bias=False)
        assert_scaled_sum(case, dp.clip_factors(n2, threshold), alone, None)
        # unwritten memory may hold anything
        over = torch.full_like(alone, math.nan)
        options["accumulate"] = False
        dp.segment_mm_clip(case.a, case.g, case.cu, threshold, over, impl=impl, **options)
        assert_scaled_sum(case, dp.clip_factors(n2, threshold), over + 0.5, None)


@pytest.mark.parametrize(("clipping", "threshold"), CLIPS)
def test_gram_clip(run, clipping, threshold):
    case, impl = run
    for bias in (False, True):
        out, bias_out = case.outputs("transposed")
        n2 = dp.segment_gram_clip(
            case.a,
            case.g,
            case.cu,
            threshold,
            out,
            bias_out=bias_out if bias else None,
            clipping=clipping,
            impl=impl,
        )
        norm, absolute = dp.segment_gram_norm(case.a, case.g, case.cu, bias=bias, impl=impl)
        expected = dp.certified_norm(norm, absolute, case.cu, case.a.shape[1], case.g.shape[1])
        torch.testing.assert_close(n2, expected, rtol=1e-5, atol=1e-5)
        factors = dp.clip_factors(n2, threshold, clipping)
        assert_scaled_sum(case, factors, out, bias_out if bias else None)


def test_units_that_break_a_promise_add_nothing(kernel_device):
    """A wrong hint must not let a unit in unclipped, or under another unit's norm."""
    case = make_units([4, 6, 2, 4], 5, 3).on(kernel_device)
    for options, kept in (({"equal": True}, [0, 3]), ({"max_seqlen": 4}, [0, 2, 3])):
        out, bias_out = case.outputs()
        n2 = dp.segment_mm_clip(
            case.a, case.g, case.cu, 1.0, out, bias_out=bias_out, impl="triton", **options
        )
        assert n2.isfinite().nonzero().flatten().tolist() == kept
        assert_scaled_sum(case, dp.clip_factors(n2, 1.0), out, bias_out)


def test_sums(run):
    case, impl = run
    x = case.a[:, :1] * case.g
    got = dp.segment_sums(x, case.cu, impl=impl)
    double = case._replace(g=x)
    expected, terms = (m[..., -1] for m in double.products())
    assert_sum_within(got, expected, terms, SUM_TOLERANCES["dp.sums"], case.longest)
    got = dp.segment_product_sums(x, case.g, case.cu, impl=impl)
    both = x.double() * case.g.double()
    expected, terms = (m[..., -1] for m in case._replace(g=both).products())
    assert_sum_within(got, expected, terms, SUM_TOLERANCES["dp.sums"], case.longest)
    assert got.dtype == case.dtype


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_accumulate(run, padding_idx):
    case, impl = run
    for tokens, transposed in ((case.tokens, False), (case.tokens.int(), True)):
        shape = (7, case.g.shape[1])
        out = case.a.new_full(shape[::-1] if transposed else shape, 0.5, dtype=case.dtype)
        out = out.T if transposed else out
        dp.embedding_accumulate(
            tokens, case.g, case.cu, case.scale, out, padding_idx=padding_idx, impl=impl
        )
        expected = case.a.new_full((2, *shape), 0.5, dtype=F64)
        for scale, (_, g, names) in zip(case.scale.tolist(), case.units(), strict=True):
            real = names != (-1 if padding_idx is None else padding_idx)
            for total, rows in zip(expected, (g, g.abs()), strict=True):
                total.index_add_(0, names[real], scale * rows[real])
        assert_sum_within(out, *expected, SUM_TOLERANCES["dp.sums"], len(case.g))


# --- what holds between them --------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=5),
    d=st.integers(1, 9),
    p=st.integers(1, 9),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_strategies_agree(lengths, d, p, strided, seed):
    pytest.importorskip("triton")
    impl = "reference" if torch.cuda.is_available() else "triton"
    case = make_units(lengths, d, p, F32, seed=seed, strided=strided)
    a, g, cu = case.a, case.g, case.cu
    norms = [
        *(dp.segment_gram_norm(a, g, cu, bias=True, impl=i)[0] for i in ("reference", impl)),
        *(dp.segment_mm_norm(a, g, cu, bias=True, impl=i) for i in ("reference", impl)),
    ]
    threshold = 3.0
    for i in ("reference", impl):
        out, bias_out = case.outputs()
        options = {"bias_out": bias_out, "impl": i, "max_seqlen": case.longest}
        norms.append(dp.segment_mm_clip(a, g, cu, threshold, out, **options))
        assert_scaled_sum(case, dp.clip_factors(norms[-1], threshold), out, bias_out)
        out, bias_out = case.outputs()
        scale = dp.clip_factors(norms[0], threshold)
        dp.segment_scaled_mm(a, g, cu, scale, out, bias_out=bias_out, impl=i)
        assert_scaled_sum(case, scale, out, bias_out)
    for n2 in norms:
        bound = dp.gram_error_bound(case.gram_terms(True).float(), cu, d, p)
        assert bool(((n2 - norms[2]).abs() <= 2 * bound).all())


def test_one_hot_inputs_make_a_token_norm(variant):
    impl, dtype, device = variant
    case = make_units([30, 0, 5], 3, 7, dtype).on(device)
    onehot = torch.nn.functional.one_hot(case.tokens, 6).to(dtype)
    by_token = dp.segment_token_gram_norm(case.tokens, case.g, case.cu, impl=impl)
    by_gram = dp.segment_gram_norm(onehot, case.g, case.cu, impl=impl)
    for x, y in zip(by_token, by_gram, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cancelling_tokens_are_not_underestimated(kernel_device, dtype):
    """Rows in pairs of almost opposite gradients: n2 is a 2^-13th of the absolute sum or less."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(64, 33, generator=generator)
    a = torch.randn(64, 40, generator=generator).repeat(2, 1) * 3
    g = torch.cat([half, -half * (1 + 2.0**-7)])
    case = make_units([128], 40, 33, dtype)._replace(a=a.to(dtype), g=g.to(dtype))
    expected = case.products()[0][..., :-1].square().sum((1, 2))
    for impl, device in (("reference", "cpu"), ("triton", kernel_device)):
        moved = case.on(device)
        n2, absolute = dp.segment_gram_norm(moved.a, moved.g, moved.cu, impl=impl)
        bound = dp.gram_error_bound(absolute, moved.cu, 40, 33).cpu()
        assert float(absolute / n2.abs()) > 2**13
        assert bool((n2.cpu() + bound >= expected).all())
        assert bool((n2.cpu() - bound <= expected).all())


def test_a_unit_with_scale_0_adds_nothing_even_nan(variant):
    impl, dtype, device = variant
    case = make_units([5, 30, 0, 30, 4], 9, 7, dtype).on(device)
    bad = slice(5, 35)
    scale = case.scale.clone()
    scale[1] = 0
    results = []
    for value in (0.0, float("nan"), float("inf")):
        a, g = case.a.clone(), case.g.clone()
        a[bad], g[bad] = value, value
        out, bias_out = case.outputs()
        dp.segment_scaled_mm(a, g, case.cu, scale, out, bias_out=bias_out, impl=impl)
        table = torch.zeros(6, 7, dtype=case.dtype, device=device)
        dp.embedding_accumulate(case.tokens, g, case.cu, scale, table, impl=impl)
        results.append((out, bias_out, table))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert_same_bits(x, y)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_unit_without_a_finite_norm_is_skipped(variant, value):
    impl, dtype, device = variant
    if value == 3e38 and dtype in (F64, FP16):
        pytest.skip("its square is finite in float64, and float16 cannot hold it")
    case = make_units([5, 30, 4, 30], 9, 7, dtype).on(device)
    bad = case.g.clone()
    bad[7] = value
    out, bias_out = case.outputs()
    options = {"bias_out": bias_out, "max_seqlen": 30, "impl": impl}
    n2 = dp.segment_mm_clip(case.a, bad, case.cu, float("inf"), out, **options)
    assert n2.isfinite().tolist() == [True, False, True, True]
    factors = dp.clip_factors(n2, float("inf"))
    assert factors.tolist() == [1, 0, 1, 1]
    assert_scaled_sum(case, factors, out, bias_out)
    gram, _ = dp.segment_gram_norm(case.a, bad, case.cu, impl=impl)
    product = dp.segment_mm_norm(case.a, bad, case.cu, impl=impl)
    for norms in (gram, product):
        assert norms.isfinite().tolist() == [True, False, True, True]


def test_without_a_threshold_the_sum_is_the_ordinary_gradient(variant):
    impl, dtype, device = variant
    case = make_units([12] * 3, 8, 6, dtype).on(device)
    out, bias_out = case.outputs()
    dp.segment_mm_clip(
        case.a, case.g, case.cu, float("inf"), out, bias_out=bias_out, equal=True, impl=impl
    )
    assert_scaled_sum(case, torch.ones(3, device=device), out, bias_out)


def test_clip_factors():
    n2 = torch.tensor([0.0, 0.25, 4.0, 1e30, float("inf"), float("nan"), -1e-9])
    shrink = 1 - 2.0**-16
    assert dp.clip_factors(n2, 1.0)[:3].tolist() == [shrink, shrink, shrink / 2]
    assert dp.clip_factors(n2, 1.0)[4:].tolist() == [0, 0, 0]
    assert dp.clip_factors(n2, float("inf")).tolist() == [1, 1, 1, 1, 0, 0, 0]
    automatic = dp.clip_factors(n2.double(), 1.0, "automatic", 0.5)
    expected = torch.tensor([2.0, 1.0, 0.4], dtype=F64) * shrink
    torch.testing.assert_close(automatic[:3], expected, rtol=1e-15, atol=0)
    assert automatic[4:].tolist() == [0, 0, 0]
    assert_same_bits(dp.clip_factors(n2, torch.tensor(2.5)), dp.clip_factors(n2, 2.5))
    norm = torch.rand(1 << 16) * 100
    clipped = dp.clip_factors(norm.square(), 0.3).double() * norm.double()
    assert float(clipped.max()) <= 0.3 < float(clipped.max()) * (1 + 2.0**-14)


@pytest.mark.parametrize("clipping", ["abadi", "automatic"])
@pytest.mark.parametrize("threshold", [0.3, float("inf")])
def test_kernel_of_the_factors_is_the_reference(kernel_device, clipping, threshold):
    n2 = torch.tensor([0.0, 1e-40, 0.09, 4.0, 1e30, 3e38, float("inf"), float("nan"), -1e-9])
    n2 = torch.cat([n2, torch.rand(1000)])
    if clipping == "automatic":
        threshold = min(threshold, 1e30)
    got = dp.clip_factors(n2.to(kernel_device), threshold, clipping, impl="triton").cpu()
    expected = dp.clip_factors(n2, threshold, clipping, impl="reference")
    torch.testing.assert_close(got, expected, rtol=2.0**-22, atol=0)
    assert got[6:9].tolist() == [0, 0, 0]


def test_kernel_of_certified_norms_is_the_reference(kernel_device):
    n2 = torch.tensor([-1.0, 0.0, 2.0, float("nan"), -float("inf"), float("inf")])
    absolute = torch.tensor([3.0, 0.0, 2.0, float("nan"), float("inf"), float("inf")])
    cu = torch.tensor([0, 1, 1, 700, 701, 702, 703], dtype=torch.int32)
    args = [t.to(kernel_device) for t in (n2, absolute, cu)]
    got = dp.certified_norm(*args, 64, 96, impl="triton").cpu()
    expected = dp.certified_norm(n2, absolute, cu, 64, 96, impl="reference")
    torch.testing.assert_close(got, expected, rtol=2.0**-22, atol=0, equal_nan=True)
    bound = dp.gram_error_bound(absolute, cu, 64, 96)
    torch.testing.assert_close(got[:3], n2[:3].clamp(min=0) + bound[:3])
    assert not got[3:].isfinite().any()


@pytest.mark.parametrize("large", [2.0**50, 2.0**-76])
@pytest.mark.parametrize("beside", [False, True])
def test_certified_norms_hold_where_products_underflow(variant, large, beside):
    """Squares of 2^-76 are below float32's smallest number; times 2^50 they are not small."""
    impl, dtype, device = variant
    if dtype in (F64, FP16):
        pytest.skip("has another range")
    small = 2.0**-26 / large
    a, g = torch.full((64, 64), small), torch.full((64, 64), large)
    if beside:  # rows of ordinary size, so that nothing shows in the sums
        a[:32], g[:32] = 1e-3, 1e-3
    a, g = a.to(dtype), g.to(dtype)
    cu = torch.tensor([0, 64], dtype=torch.int32)
    true = float((g.double().T @ a.double()).square().sum())
    a, g, cu = (x.to(device) for x in (a, g, cu))
    n2, absolute = dp.segment_gram_norm(a, g, cu, impl=impl)
    assert float(dp.certified_norm(n2, absolute, cu, 64, 64)) >= true * (1 - 1e-5)


def test_length_of_the_longest_unit_is_only_a_hint(variant):
    impl, dtype, device = variant
    case = make_units([130, 0, 7], 5, 7, dtype).on(device)
    for hint in (None, 0, 1, 1000):
        n2, absolute = dp.segment_gram_norm(case.a, case.g, case.cu, max_seqlen=hint, impl=impl)
        assert_gram_norm(case, n2, absolute, bias=False)


@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_bounds_of_temporaries_change_nothing(monkeypatch, chunk):
    for bound in ("GRAM_CHUNK", "PRODUCT_CHUNK", "GRAM_ROWS", "PRODUCT_ROWS"):
        monkeypatch.setattr(f"shared_kernels.ops.dp.reference._{bound}", chunk)
    case = make_units([9, 9, 9, 0, 30, 9], 5, 23)
    n2, absolute = dp.segment_gram_norm(case.a, case.g, case.cu, bias=True)
    assert_gram_norm(case, n2, absolute, bias=True)
    assert_mm_norm(case, dp.segment_mm_norm(case.a, case.g, case.cu, bias=True), bias=True)
    out, bias_out = case.outputs()
    dp.segment_scaled_mm(case.a, case.g, case.cu, case.scale, out, bias_out=bias_out)
    assert_scaled_sum(case, case.scale, out, bias_out)


def test_non_contiguous_inputs(variant):
    impl, dtype, device = variant
    case = make_units([20, 3, 11], 7, 5, dtype, strided=True).on(device)
    assert not case.a.is_contiguous()
    twice = UnitRows(case.a, case.g[:, :1].expand(-1, 5), *case[2:])
    for strided in (case, twice):
        copied = UnitRows(*(t.contiguous() for t in strided))
        for x, y in zip(everything(strided, impl), everything(copied, impl), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


def everything(case: UnitRows, impl: str) -> list[Tensor]:
    """Call every function once and return all results."""
    a, g, cu, tokens, scale = case
    out, bias_out = case.outputs()
    clipped, bias_clipped = case.outputs()
    table = torch.zeros(6, g.shape[1], dtype=case.dtype, device=g.device)
    results = [
        *dp.segment_gram_norm(a, g, cu, bias=True, impl=impl),
        *dp.segment_token_gram_norm(tokens, g, cu, impl=impl),
        dp.segment_mm_norm(a, g, cu, bias=True, impl=impl),
        dp.segment_mm_clip(
            a, g, cu, 1.0, clipped, bias_out=bias_clipped, max_seqlen=case.longest, impl=impl
        ),
        dp.segment_sums(g, cu, impl=impl),
        dp.segment_product_sums(g, g, cu, impl=impl),
    ]
    dp.segment_scaled_mm(a, g, cu, scale, out, bias_out=bias_out, impl=impl)
    dp.embedding_accumulate(tokens, g, cu, scale, table, impl=impl)
    return [*results, out, bias_out, clipped, bias_clipped, table]


def test_twice_the_same_bits_and_nothing_unwritten(variant):
    impl, dtype, device = variant
    case = make_units([70, 0, 3], 35, 19, dtype).on(device)
    expected = everything(case, impl)
    with poisoned_empty():
        again = everything(case, impl)
    for x, y in zip(again, expected, strict=True):
        assert_same_bits(x, y)


def test_float32_is_never_multiplied_in_less():
    """Whatever the process allows (on CPUs with such units), and the process's choice is kept."""
    matmul = torch.backends.cuda.matmul
    saved = matmul.fp32_precision
    case = make_units([20], 5, 3)
    try:
        matmul.fp32_precision = "tf32"
        assert_gram_norm(case, *dp.segment_gram_norm(case.a, case.g, case.cu), bias=False)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = saved
