"""Sums of segments of rows: exact where numbers are, else against sums without rounding."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.errors import FallbackError, KernelUnavailableError
from shared_kernels.ops.segments import (
    COLUMNS,
    AssignmentSums,
    assignment_sums,
    launch,
    norm_sums,
    op,
    reference,
    segment_sums,
)
from shared_kernels.testing import assert_sum_within, check_op, poisoned_empty
from shared_kernels.testing.tolerances import SUM_TOLERANCES

F64 = torch.float64
IMPLS = ["reference", "triton"]
KINDS = ["sum", "abs", "square"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]
NAN = float("nan")
#: With chunks of 4 rows: none, all, empty ones everywhere, sizes around chunks and their multiples.
COUNTS = [
    [0, 0, 0], [0], [1], [4], [5], [3, 4, 5], [0, 7, 0, 0, 8, 1, 0], [0, 0, 21], [21, 0, 0],
    [2, 0, 1] * 13, [0] * 20 + [9] + [0] * 20 + [16, 15, 17, 1],
]  # fmt: skip


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


def bounds(counts):
    return list(pairwise([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]))


def draw(rows, width, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=F64)
    # of sizes far apart: what float32 would drop must not be dropped
    x *= 10 ** torch.randint(-4, 4, (rows, 1), generator=generator).double()
    return x.to(dtype).to(device)


def integers(rows, width, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-256, 257, (rows, width), generator=generator).to(device, dtype)


def long(counts, device="cpu"):
    return torch.tensor(counts, dtype=torch.int64, device=device)


def value(x, kind):
    """What is summed, in float64, after the arithmetic that its definition names."""
    x = x.cpu() if x.dtype == F64 else x.float().cpu()
    return {"sum": x, "abs": x.abs(), "square": x * x}[kind].double()


def exact(x, counts, keep=None):
    """Sums of float64 rows that round once."""
    out = torch.zeros(len(counts), x.shape[1], dtype=F64)
    for e, (low, high) in enumerate(bounds(counts)):
        rows = [i for i in range(low, high) if keep is None or keep[i]]
        for c in range(x.shape[1]):
            out[e, c] = math.fsum(x[i, c].item() for i in rows)
    return out


def assert_close(found, x, counts, keep=None):
    """Compare with the sums of x within what float64 sums of so many rows round."""
    most = max(1, *counts) if counts else 1
    terms = exact(x.abs(), counts, keep)
    assert_sum_within(found.cpu(), exact(x, counts, keep), terms, SUM_TOLERANCES["dp.sums"], most)


@pytest.fixture
def small(monkeypatch):
    """Chunks, blocks and tiles of which tiny inputs have several."""
    monkeypatch.setattr(launch, "chunk_rows", lambda rows: 4)
    monkeypatch.setattr(launch, "COLS", 8)
    monkeypatch.setattr(launch, "SEGMENTS", 16)
    monkeypatch.setattr(launch, "TILE_BYTES", 64)
    monkeypatch.setattr(launch, "PARTS", 64)
    monkeypatch.setattr(reference, "_MOST", 50)
    monkeypatch.setattr(reference, "_BLOCK", 40)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_integers_are_exact(kernel_device, impl, kind, dtype, small):
    device = place(impl, kernel_device)
    for counts in COUNTS if (kind, dtype) == ("sum", torch.bfloat16) else COUNTS[4:7]:
        x = integers(sum(counts), 11, dtype, device)
        whole = x.cpu().long()
        whole = {"sum": whole, "abs": whole.abs(), "square": whole * whole}[kind]
        wanted = torch.stack([whole[low:high].sum(0) for low, high in bounds(counts)])
        found = segment_sums(x, long(counts, device), kind=kind, impl=impl)
        assert found.dtype == F64
        assert torch.equal(found.cpu(), wanted.double()), counts


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_float64(kernel_device, impl, kind, dtype, small):
    device = place(impl, kernel_device)
    for counts in ([0, 17, 0, 4, 3, 0], [30]):
        x = draw(sum(counts), 9, dtype, device)
        found = segment_sums(x, long(counts, device), kind=kind, impl=impl)
        assert_close(found, value(x, kind), counts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 5, 128, 1027])
def test_with_blocks_as_they_are(kernel_device, impl, width):
    device = place(impl, kernel_device)
    counts = [0, 31, 32, 33, 0, 70]
    x = draw(sum(counts), width, torch.float32, device)
    assert_close(
        segment_sums(x[:, -4:], long(counts, device), impl=impl), value(x[:, -4:], "sum"), counts
    )
    found = segment_sums(x, long(counts, device), impl=impl)
    wanted = torch.stack([x[low:high].double().sum(0) for low, high in bounds(counts)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_counts_all_rows_are_one_segment(kernel_device, impl, small):
    device = place(impl, kernel_device)
    for rows in (0, 1, 3, 4, 5, 29):
        x = draw(rows, 19, device=device)
        for kind in KINDS:
            assert_close(segment_sums(x, kind=kind, impl=impl), value(x, kind), [rows])


def layouts(x):
    """The same numbers with other strides."""
    rows, width = x.shape
    wide = x.new_full((rows + 2, 2 * width + 1), NAN)
    wide[1:-1, 1::2] = x
    yield wide[1:-1, 1::2]
    yield x.t().contiguous().t()
    padded = x.new_full((rows, width + 3), NAN)
    padded[:, 3:] = x
    yield padded[:, 3:]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(kernel_device, impl, dtype, small):
    device = place(impl, kernel_device)
    counts = [5, 0, 8, 3]
    x, c = draw(16, 11, dtype, device), long(counts, device)
    weight = torch.rand(16, device=device)
    for other in layouts(x):
        assert not other.is_contiguous()
        assert_close(segment_sums(other, c, impl=impl), value(x, "sum"), counts)
        square, absolute = norm_sums(other, other, impl=impl)
        assert_close(square[None], value(x, "square"), [16])
        assert_close(absolute[None], value(x, "abs"), [16])
        mine = assignment_sums(other, weight, weight, c, impl=impl)
        wanted = assignment_sums(x, weight, weight, c, impl=impl)
        assert_close(mine.output, value(x, "sum"), counts)
        # norms of other strides may be summed in another order
        torch.testing.assert_close(mine.columns, wanted.columns, rtol=1e-6, atol=0)
    repeated = x[:1].expand(16, 11)
    assert_close(segment_sums(repeated, c, impl=impl), value(repeated, "sum"), counts)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_do_not_count_are_not_read(kernel_device, impl, small):
    device = place(impl, kernel_device)
    counts = [0, 9, 4, 1, 0, 6]
    c = long(counts, device)
    x, weight, share = draw(20, 11, device=device), torch.rand(20), torch.rand(20, dtype=F64)
    weight, share = weight.to(device), share.to(device)
    keep = torch.arange(20, device=device) % 3 != 1
    keep[13] = False  # all of a segment
    for kind in KINDS:
        found = segment_sums(x, c, kind=kind, keep=keep, impl=impl)
        assert_close(found, value(x, kind), counts, keep)
        assert not found[3].any()
    clean = (
        segment_sums(x, c, keep=keep, impl=impl),
        *norm_sums(x, x, keep=keep, impl=impl),
        *assignment_sums(x, weight, share, c, keep=keep, impl=impl),
    )
    assert clean[-1][:, 0].tolist() == [keep[low:high].sum().item() for low, high in bounds(counts)]
    x[~keep], weight[~keep], share[~keep] = NAN, NAN, NAN
    dirty = (
        segment_sums(x, c, keep=keep, impl=impl),
        *norm_sums(x, x, keep=keep, impl=impl),
        *assignment_sums(x, weight, share, c, keep=keep, impl=impl),
    )
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)
    nothing = torch.zeros_like(keep)
    assert not any(part.any() for part in norm_sums(x, x, keep=nothing, impl=impl))
    assert not any(
        part.any() for part in assignment_sums(x, weight, share, c, keep=nothing, impl=impl)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_are_added_to_what_is_there(kernel_device, impl, small):
    device = place(impl, kernel_device)
    counts = [6, 0, 5, 2]
    x, c = integers(13, 11, device=device), long(counts, device)
    weight = torch.arange(13, device=device) / 8
    once = assignment_sums(x, weight, weight, c, impl=impl)
    out = torch.full((4, 11), 0.5, dtype=F64, device=device)
    assert segment_sums(x, c, out=out, impl=impl) is out
    assert torch.equal(out, once.output + 0.5)
    twice = assignment_sums(x, weight, weight, c, out=once, impl=impl)
    assert twice is once
    fresh = assignment_sums(x, weight, weight, c, impl=impl)
    assert torch.equal(twice.output, 2 * fresh.output)
    assert torch.equal(twice.columns[:, :5], 2 * fresh.columns[:, :5])
    # of norms the larger one stays, whichever comes first
    assert torch.equal(twice.column("norm_max"), fresh.column("norm_max"))
    assignment_sums(3 * x, weight, weight, c, out=once, impl=impl)
    top = fresh.column("norm_max")
    torch.testing.assert_close(once.column("norm_max"), 3 * top, rtol=1e-6, atol=0)
    assignment_sums(x, weight, weight, c, out=once, impl=impl)
    torch.testing.assert_close(once.column("norm_max"), 3 * top, rtol=1e-6, atol=0)
    a, b = (torch.ones(11, dtype=F64, device=device) for _ in range(2))
    first, second = norm_sums(x, 2 * x, out=(a, b), impl=impl)
    assert (first is a) and (second is b)
    assert torch.equal(a, segment_sums(x, kind="square", impl=impl)[0] + 1)
    assert torch.equal(b, segment_sums(2 * x, kind="abs", impl=impl)[0] + 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_both_sides(kernel_device, impl, dtype, small):
    device = place(impl, kernel_device)
    for rows, width in ((0, 3), (1, 1), (23, 17)):
        x, y = draw(rows, width, dtype, device), draw(rows, width, torch.float32, device, seed=3)
        square, absolute = norm_sums(x, y, impl=impl)
        assert square.shape == absolute.shape == (width,)
        assert_close(square[None], value(x, "square"), [rows])
        assert_close(absolute[None], value(y, "abs"), [rows])


def brute(output, weight, share, counts):
    """Columns from exact sums of float64 norms."""
    columns = torch.zeros(len(counts), len(COLUMNS), dtype=F64)
    norm = [math.sqrt(math.fsum(v * v for v in row)) for row in output.double().cpu().tolist()]
    w, s = weight.double().tolist(), share.double().tolist()
    for e, (low, high) in enumerate(bounds(counts)):
        rows = range(low, high)
        columns[e, 0] = len(rows)
        columns[e, 1] = math.fsum(w[i] for i in rows)
        columns[e, 2] = math.fsum(s[i] for i in rows)
        columns[e, 3] = math.fsum(norm[i] for i in rows)
        columns[e, 4] = math.fsum(w[i] * norm[i] for i in rows)
        columns[e, 5] = max((norm[i] for i in rows), default=0.0)
    return columns


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_assignments_against_brute_force(kernel_device, impl, dtype, small):
    device = place(impl, kernel_device)
    for counts in COUNTS if dtype == torch.float32 else COUNTS[4:7]:
        rows = sum(counts)
        x = draw(rows, 13, dtype, device)
        weight, share = torch.rand(rows).to(device, dtype), torch.rand(rows, dtype=F64).to(device)
        found = assignment_sums(x, weight, share, long(counts, device), impl=impl)
        assert_close(found.output, value(x, "sum"), counts)
        wanted = brute(x, weight, share, counts)
        found = found.columns.cpu()
        torch.testing.assert_close(found[:, :3], wanted[:, :3], rtol=1e-14, atol=0)
        # squares of 13 numbers and their root, in float32 unless the rows are float64
        bound = 1e-14 if dtype == F64 else 1e-6
        torch.testing.assert_close(found[:, 3:], wanted[:, 3:], rtol=bound, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_exact_norms_have_exact_sums(kernel_device, impl, small):
    device = place(impl, kernel_device)
    counts = [0, 10, 3, 0, 4, 1]
    # 3, 4, 12 and 84 have norm 85; rows are multiples of it
    factor = torch.arange(18) - 9.0
    x = torch.zeros(18, 13)
    x[:, [1, 4, 7, 12]] = factor[:, None] * torch.tensor([3.0, 84.0, 12.0, 4.0])
    weight, share = (torch.arange(18) - 3) / 8, torch.arange(18, dtype=F64) / 64
    found = assignment_sums(
        x.to(device), weight.to(device), share.to(device), long(counts, device), impl=impl
    )
    assert torch.equal(found.columns.cpu(), brute(x, weight, share, counts))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 16, 100])
def test_wide_rows_and_many_of_them(kernel_device, impl, width):
    device = place(impl, kernel_device)
    counts = [40, 0, 90, 1]
    x, weight = draw(131, width, device=device), torch.rand(131, device=device)
    found = assignment_sums(x, weight, weight, long(counts, device), impl=impl)
    wanted = brute(x, weight, weight, counts)
    torch.testing.assert_close(found.columns.cpu(), wanted, rtol=2e-6, atol=0)
    sums = segment_sums(x, long(counts, device), impl=impl)
    torch.testing.assert_close(found.output, sums, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_and_orders_differ_by_rounding(kernel_device, impl, small):
    device = place(impl, kernel_device)
    counts = [12, 0, 7, 21]
    x, weight = draw(40, 9, device=device), torch.rand(40, device=device)
    whole = assignment_sums(x, weight, weight, long(counts, device), impl=impl)
    size = segment_sums(x, long(counts, device), kind="abs", impl=impl)
    generator = torch.Generator().manual_seed(5)
    order = torch.cat(
        [low + torch.randperm(high - low, generator=generator) for low, high in bounds(counts)]
    )
    other = assignment_sums(x[order], weight[order], weight[order], long(counts, device), impl=impl)
    # in three batches of which each has some rows of each segment
    split = AssignmentSums.empty(4, 9, device=device)
    for batch in range(3):
        rows = [range(low + batch, high, 3) for low, high in bounds(counts)]
        at = torch.tensor([i for part in rows for i in part], device=device)
        given = long([len(part) for part in rows], device)
        assignment_sums(x[at], weight[at], weight[at], given, out=split, impl=impl)
    for found in (other, split):
        assert ((found.output - whole.output).abs() <= 1e-14 * size).all()
        torch.testing.assert_close(found.columns, whole.columns, rtol=1e-6, atol=0)
        assert torch.equal(found.columns[:, 0], whole.columns[:, 0])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter's maximum
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_stays_in_its_place(kernel_device, impl, small):
    device = place(impl, kernel_device)
    counts = [6, 9, 5]
    weight = torch.ones(20, device=device)
    for bad, row in ((NAN, 6), (NAN, 14), (float("inf"), 8), (-float("inf"), 8)):
        x = draw(20, 11, device=device)
        x[row, 2] = bad
        found = assignment_sums(x, weight, weight, long(counts, device), impl=impl)
        wanted = torch.ones(3, 11, dtype=torch.bool)
        wanted[1, 2] = False
        assert torch.equal(found.output.isfinite().cpu(), wanted)
        assert found.columns.isfinite().all(1).tolist() == [True, False, True]
        for name in ("norm", "weighted_norm", "norm_max"):
            number = found.column(name)[1].item()
            assert math.isnan(number) if math.isnan(bad) else number == abs(bad)
        # and is not forgotten
        assignment_sums(draw(20, 11, device=device), weight, weight, long(counts, device),
                        out=found, impl=impl)  # fmt: skip
        assert not found.column("norm_max")[1].isfinite()
        square, _ = norm_sums(x, x, impl=impl)
        assert square.isfinite().tolist() == [c != 2 for c in range(11)]


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(counts=st.lists(st.integers(0, 9), max_size=6), width=st.integers(0, 6),
       kind=st.sampled_from(KINDS), narrow=st.booleans())  # fmt: skip
def test_odd_shapes(counts, width, kind, narrow):
    x = draw(sum(counts), width, torch.bfloat16 if narrow else F64)
    for impl in IMPLS if not torch.cuda.is_available() else IMPLS[:1]:
        found = segment_sums(x, long(counts), kind=kind, impl=impl)
        assert found.shape == (len(counts), width)
        assert_close(found, value(x, kind), counts)


def test_counts_that_lie_do_not_lead_outside(kernel_device, small):
    counts = ([3, 40], [40, 3], [1, 1], [-5, 20, 5], [1 << 40, 5], [-(1 << 40), 20])
    for given_counts in counts:
        c = long(given_counts, kernel_device)
        margin = torch.full((40, 11), NAN, device=kernel_device)
        margin[10:30] = 1.0
        x = margin[10:30]
        out = torch.full((len(c) + 2, 11), 7.0, dtype=F64, device=kernel_device)
        sums = torch.zeros(len(c), 11, dtype=F64, device=kernel_device)
        columns = torch.zeros(len(c), 6, dtype=F64, device=kernel_device)
        with poisoned_empty(torch.Tensor.zero_):
            launch.segment_sums_(x, c, None, out[1:-1], "sum")
            launch.assignment_sums_(x, x[:, 0].clone(), x[:, 0].double(), c, None, sums, columns)
        assert out.isfinite().all()
        assert (out[0] == 7).all() and (out[-1] == 7).all()
        assert sums.isfinite().all() and columns.isfinite().all()


def test_a_row_must_fit_a_program():
    x, weight, counts = torch.zeros(2, 8193), torch.zeros(2), long([2])
    with pytest.raises(KernelUnavailableError, match="at most 8192 columns"):
        launch.assignment_sums_(x, weight, weight, counts, None, x[:1].double(), x[:1, :6].double())
    assert launch.assignments_unsupported(x[:, :8192]) is None
    assert launch.assignments_unsupported(x) == "a program holds at most 8192 columns, got 8193"


def test_bad_input():
    x, weight = torch.zeros(5, 3), torch.zeros(5)
    for counts in ([2, 2], [3, 3], [-1, 6]):
        for impl in IMPLS if not torch.cuda.is_available() else IMPLS[:1]:
            with pytest.raises(ValueError, match="counts: expected row counts that add up to 5"):
                segment_sums(x, long(counts), impl=impl)
            with pytest.raises(ValueError, match="counts: expected row counts that add up to 5"):
                assignment_sums(x, weight, weight, long(counts), impl=impl)
    with pytest.raises(ValueError, match="kind: expected one of sum, abs, square"):
        segment_sums(x, kind="cube")
    with pytest.raises(TypeError, match="counts"):
        segment_sums(x, torch.tensor([5], dtype=torch.int32))
    with pytest.raises(TypeError, match="x: expected"):
        segment_sums(x.long())
    with pytest.raises(ValueError, match="x: expected shape"):
        segment_sums(x[0])
    with pytest.raises(ValueError, match="outside autograd"):
        segment_sums(x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"out: expected shape \(2, 3\)"):
        segment_sums(x, long([2, 3]), out=torch.zeros(1, 3, dtype=F64))
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        segment_sums(x, long([2, 3]), out=torch.zeros(3, 2, dtype=F64).t())
    with pytest.raises(TypeError, match="out: expected float64"):
        segment_sums(x, out=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"keep: expected shape \(5,\)"):
        segment_sums(x, keep=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="keep: expected bool"):
        norm_sums(x, x, keep=torch.ones(5))
    with pytest.raises(ValueError, match=r"y: expected shape \(5, 3\)"):
        norm_sums(x, x[:, :2])
    with pytest.raises(ValueError, match=r"weight: expected shape \(5,\)"):
        assignment_sums(x, weight[1:], weight, long([5]))
    with pytest.raises(ValueError, match=r"share: expected shape \(5,\)"):
        assignment_sums(x, weight, weight[1:], long([5]))
    with pytest.raises(ValueError, match=r"out\.output: expected shape \(1, 3\)"):
        assignment_sums(x, weight, weight, long([5]), out=AssignmentSums.empty(2, 3))
    with pytest.raises(ValueError, match="impl"):
        segment_sums(x, impl="fast")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
def test_op_checklist(kernel_device, impl, masked, small):
    device = place(impl, kernel_device)

    def rows(size):
        counts = [size // 3, 0, size - size // 3]
        keep = torch.arange(size, device=device) % 3 > 0 if masked else None
        return draw(size, 9, device=device), long(counts, device), keep

    def zeros(*shape):
        return torch.zeros(shape, dtype=F64, device=device)

    def sums(size):
        x, counts, keep = rows(size)
        return x, counts, keep, zeros(3, 9), "abs", impl

    sizes = [13, 0] if masked else [13, 0, 1, 16]
    check_op(op.segment_sums_, sums, sizes)

    def both(size):
        x, _, keep = rows(size)
        return x, draw(size, 9, device=device, seed=2), keep, zeros(9), zeros(9), impl

    check_op(op.norm_sums_, both, sizes)

    def assignments(size):
        x, counts, keep = rows(size)
        weight = x[:, 0].abs().contiguous()
        return x, weight, weight.double(), counts, keep, zeros(3, 9), zeros(3, 6), impl

    check_op(op.assignment_sums_, assignments, sizes)


def routed(rows, width, experts, device, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, generator=generator, device=device, dtype=dtype)
    # some experts have many rows, some none
    share = torch.rand(experts, generator=generator, device=device) ** 4
    share[::9] = 0
    expert = torch.multinomial(share, rows, True, generator=generator)
    weight = torch.rand(rows, generator=generator, device=device, dtype=dtype)
    return x, weight, weight.double() / 8, torch.bincount(expert, minlength=experts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(131072, 2048, 128), (16384, 2880, 32), (70001, 770, 100),
                                   (9000, 7168, 256), (5000, 8192, 7)])  # fmt: skip
def test_on_a_gpu(cuda, dtype, shape):
    x, weight, share, counts = routed(*shape, cuda, dtype)
    ends = bounds(counts.tolist())
    wide = x if dtype == F64 else x.float()
    norm = torch.linalg.vector_norm(x.double(), dim=-1)
    found = assignment_sums(x, weight, share, counts)
    again = assignment_sums(x, weight, share, counts)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for kind, terms in (("sum", wide), ("abs", wide.abs()), ("square", wide.square())):
        mine = segment_sums(x, counts, kind=kind)
        assert torch.equal(mine, segment_sums(x, counts, kind=kind))
        wanted = torch.stack([terms[a:b].sum(0, dtype=F64) for a, b in ends])
        size = torch.stack([terms[a:b].abs().sum(0, dtype=F64) for a, b in ends])
        assert ((mine - wanted).abs() <= 1e-13 * size).all(), kind
        if kind == "sum":
            assert ((found.output - wanted).abs() <= 1e-13 * size).all()
    w = weight.double()
    columns = torch.stack([torch.ones_like(w), w, share, norm, w * norm], -1)
    wanted = torch.stack([columns[a:b].sum(0) for a, b in ends])
    torch.testing.assert_close(found.columns[:, :3], wanted[:, :3], rtol=1e-12, atol=0)
    # float32 squares of a row: sqrt(width) roundings, of which the root takes half
    bound = 1e-12 if dtype == F64 else 1e-6
    torch.testing.assert_close(found.columns[:, 3:5], wanted[:, 3:], rtol=bound, atol=0)
    most = torch.stack([norm[a:b].amax() if b > a else norm.new_zeros(()) for a, b in ends])
    torch.testing.assert_close(found.column("norm_max"), most, rtol=bound, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_on_a_gpu(cuda, dtype):
    for rows, width in ((16384, 2048), (16384, 128), (12345, 1000), (3, 5000)):
        x, _, _, _ = routed(rows, width, 2, cuda, dtype)
        wide = x if dtype == F64 else x.float()
        keep = torch.arange(rows, device=cuda) % 5 > 0
        for mask in (None, keep):
            kept = wide if mask is None else wide[mask]
            square, absolute = norm_sums(x, x, keep=mask)
            torch.testing.assert_close(square, kept.square().sum(0, dtype=F64), rtol=1e-12, atol=0)
            torch.testing.assert_close(absolute, kept.abs().sum(0, dtype=F64), rtol=1e-12, atol=0)
            alone = segment_sums(x, kind="abs", keep=mask)[0]
            torch.testing.assert_close(absolute, alone, rtol=1e-13, atol=0)


@pytest.mark.gpu
def test_past_two_to_the_31st_element(cuda):
    rows, width = (1 << 20) + 5, 2056
    x = torch.ones(rows, width, device=cuda, dtype=torch.bfloat16)
    counts = long([rows - 3, 0, 3], cuda)
    x[-1] = 3
    found = assignment_sums(x, x[:, 0].contiguous(), x[:, 1].double(), counts)
    assert (found.output[0] == rows - 3).all()
    assert (found.output[2] == 5).all()
    assert torch.equal(segment_sums(x, counts), found.output)
    assert (segment_sums(x.t())[0, -1:] == width * 3).all()


@pytest.mark.gpu
def test_nothing_waits_for_the_device(cuda):
    x, weight, share, counts = routed(5000, 300, 16, cuda)
    out = AssignmentSums.empty(16, 300, device=cuda)
    square, absolute = torch.zeros(2, 300, dtype=F64, device=cuda)

    def step():
        assignment_sums(x, weight, share, counts, out=out)
        segment_sums(x, counts, kind="abs", out=out.output)
        norm_sums(x, x, out=(square, absolute))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for part in (*out, square, absolute):
        part.zero_()
    # other counts than were captured
    counts.copy_(counts.roll(1))
    graph.replay()
    wanted = assignment_sums(x, weight, share, counts)
    assert torch.equal(out.columns, wanted.columns)
    assert torch.equal(out.output, wanted.output + segment_sums(x, counts, kind="abs"))


@pytest.mark.gpu
def test_wide_rows_fall_back_and_say_so(cuda, monkeypatch):
    x, weight, share, counts = routed(100, 9000, 4, cuda)
    with pytest.raises(FallbackError, match="at most 8192 columns"):
        assignment_sums(x, weight, share, counts)
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "0")
    with pytest.warns(RuntimeWarning, match="slow reference"):
        found = assignment_sums(x, weight, share, counts)
    torch.testing.assert_close(found.output, segment_sums(x, counts), rtol=1e-12, atol=1e-12)
