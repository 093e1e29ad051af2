"""The noise step: every implementation against the definition, and what privacy rests on."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.bench import Ceilings, Plan, load_benchmarks, run_workload
from shared_kernels.bench.runner import GateError
from shared_kernels.ops.dp import gaussian_step, gaussian_steps
from shared_kernels.ops.dp.noise.op import double_bits, gaussian_steps_
from shared_kernels.random.chacha import key_from_seed
from shared_kernels.random.chacha.keys import key_words
from shared_kernels.random.chacha.reference import standard_normals
from shared_kernels.testing import TOLERANCES, assert_within, check_op
from shared_kernels.testing.imports import assert_does_not_load, modules_loaded_by
from torch import Tensor

F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KEY = key_from_seed(7)
STREAM = {"key": KEY, "step": (5 << 32) + 9, "uid": 0xFEDCBA98, "domain": 200}
STD, DIVISOR = 0.37, 256.5
N = 1 << 20
#: Kolmogorov's distribution exceeds this with the two-sided probability of four sigma.
KOLMOGOROV_FOUR_SIGMA = 2.28


def totals(n: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(total: Tensor, dtype: torch.dtype = F32, device: str = "cpu", **options: Any) -> Tensor:
    """Run the step on a copy; the result, on the CPU, begins as NaN."""
    out = torch.full(total.shape, math.nan, dtype=dtype, device=device)
    gaussian_step(total.to(device), out, **{**STREAM, "std": STD, "divisor": DIVISOR, **options})
    return out.cpu()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Assert equal bits, any NaN being equal to any NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert actual.dtype == expected.dtype
    same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"


# --- identities ---------------------------------------------------------------------------------

SLICES = [(0, 0), (0, 1), (1, 2046), (2047, 2), (2048, 2048), (2049, 4095), (7, 97)]
FAR = [((1 << 35) - 1000, 3000), ((1 << 51) - 2049, 2049), ((5 << 41) + 77, 4100)]


@pytest.mark.parametrize("dtype", [F32, BF16, FP16, F64])
@pytest.mark.parametrize(("start", "n"), [*SLICES, *FAR])
def test_numba_is_the_reference(start, n, dtype):
    for source in (F32, F64):
        total = totals(n, source)
        expected = run(total, dtype, start=start, impl="reference")
        assert_same(run(total, dtype, start=start, impl="numba"), expected)


def test_numba_is_the_reference_on_a_million_elements():
    total = totals(N + 4099)
    expected = run(total, start=4093, impl="reference")
    assert_same(run(total, start=4093, impl="numba"), expected)


@pytest.mark.parametrize("dtype", [F32, BF16, FP16, F64])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (2047, 2), (2049, 4095), *FAR])
def test_triton_is_the_reference(kernel_device, start, n, dtype):
    for source in (F32, F64):
        total = totals(n, source)
        got = run(total, dtype, kernel_device, start=start, impl="triton")
        expected = run(total, dtype, start=start, impl="reference")
        if kernel_device == "cpu" and dtype in (BF16, FP16):
            assert_within(got, expected, TOLERANCES["dp_noise.16bit/interpreter"])
        else:
            assert_same(got, expected)


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_without_noise_it_is_the_quotient(kernel_device, impl, dtype):
    device = kernel_device if impl == "triton" else "cpu"
    total = totals(5000, dtype)
    total[:3] = torch.tensor([math.inf, -0.0, 3e38])
    got = run(total, dtype, device, std=0, start=3, impl=impl)
    assert_same(got, torch.from_numpy(total.numpy() / total.numpy().dtype.type(DIVISOR)))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    cuts=st.lists(st.integers(0, 20_000), max_size=5),
    start=st.sampled_from([0, 5, (1 << 33) + 100, (1 << 35) - 9000]),
)
def test_any_sharding_gives_the_same_numbers(cuts, start):
    total = totals(20_000)
    whole = run(total, start=start)
    edges = [0, *sorted(cuts), 20_000]
    parts = [run(total[a:b].clone(), start=start + a) for a, b in pairwise(edges)]
    assert_same(torch.cat(parts), whole)


def test_threads_do_not_change_the_numbers():
    total = totals(300_001)
    one = run(total, start=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert_same(run(total, start=5), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_in_place(kernel_device, impl, dtype):
    device = kernel_device if impl == "triton" else "cpu"
    total = totals(5000, dtype)
    expected = run(total, dtype, start=9, impl="reference")
    options = {**STREAM, "std": STD, "divisor": DIVISOR, "start": 9, "impl": impl}
    same = total.to(device, copy=True)
    gaussian_step(same, same, **options)
    assert_same(same.cpu(), expected)
    view = total.to(device, copy=True)
    gaussian_step(view, view.view(50, 100).flatten(), **options)
    assert_same(view.cpu(), expected)


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_only_the_result_is_written(kernel_device, impl, dtype):
    total = totals(3000, dtype).to(kernel_device if impl == "triton" else "cpu")
    before, key = total.clone(), KEY.clone()
    gaussian_step(total, torch.empty_like(total), **STREAM, std=1, divisor=1, impl=impl)
    assert torch.equal(total, before)
    assert torch.equal(KEY, key)


def many(seed: int = 0) -> dict[str, list]:
    """Parameters of several dtypes, sizes and deviations, two of them parts of one."""
    rows = [
        (2048, F32, BF16, 3, 0.5, 0),
        (1, F32, BF16, 4, 0.5, 0),
        (5000, F32, BF16, 5, 2.0, 0),
        (0, F32, BF16, 6, 2.0, 0),
        (777, F32, BF16, 0xFEDCBA98, 2.0, (1 << 35) - 100),
        (4100, F32, F32, 8, 1.0, 0),
        (4100, F32, F32, 8, 1.0, 4100),
        (300, F64, F32, 9, 1.0, 2047),
        (900, F32, BF16, 10, 0.0, 0),
        (33, F32, BF16, 11, 0.5, 4095),
    ]
    return {
        "totals": [totals(row[0], row[1], seed + i) for i, row in enumerate(rows)],
        "outs": [torch.full((row[0],), math.nan, dtype=row[2]) for row in rows],
        "uids": [row[3] for row in rows],
        "stds": [row[4] for row in rows],
        "starts": [row[5] for row in rows],
    }


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
def test_many_are_each_alone(kernel_device, impl):
    device = kernel_device if impl == "triton" else "cpu"
    case = {k: [v.to(device) if isinstance(v, Tensor) else v for v in c] for k, c in many().items()}
    # the sixth in place
    case["outs"][5] = case["totals"][5]
    rest = {"key": KEY, "step": 5, "divisor": DIVISOR}
    expected = [torch.empty_like(out) for out in case["outs"]]
    for total, out, uid, std, start in zip(
        case["totals"], expected, case["uids"], case["stds"], case["starts"], strict=True
    ):
        gaussian_step(total, out, uid=uid, std=std, start=start, impl=impl, **rest)
    gaussian_steps(**case, impl=impl, **rest)
    for got, want in zip(case["outs"], expected, strict=True):
        assert_same(got.cpu(), want.cpu())


def test_lists_must_fit():
    case = many() | {"key": KEY, "step": 5, "divisor": DIVISOR}
    for name in ("outs", "uids", "stds", "starts"):
        with pytest.raises(ValueError, match=f"{name}: expected 10 of them, got int 9; pass one"):
            gaussian_steps(**case | {name: case[name][1:]})
    with pytest.raises(ValueError, match="totals: expected one or more tensors"):
        gaussian_steps([], [], key=KEY, step=5, uids=[], stds=[], divisor=1)


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
def test_infinities_and_nan_come_through(kernel_device, impl):
    total = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
    got = run(total, F32, kernel_device if impl == "triton" else "cpu", divisor=1, impl=impl)
    assert got[:2].tolist() == [math.inf, -math.inf]
    assert bool(got[2].isnan())
    assert float(got[3]) == pytest.approx(3e38)


# --- the formula --------------------------------------------------------------------------------


def normals(n: int, start: int) -> Tensor:
    rest = {name: STREAM[name] for name in ("step", "uid", "domain")}
    return standard_normals(n, key=key_words(KEY), start=start, **rest)


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_the_formula_in_float64(impl):
    total = totals(50_000, F64)
    exact = (total + STD * normals(50_000, 1000)) / DIVISOR
    grid = STD * 2**-20
    got = run(total, F64, start=1000, impl=impl)
    assert float((got - exact).abs().max()) <= grid / 2 / DIVISOR * (1 + 1e-6)
    single = run(total.float(), F32, start=1000, impl=impl).double()
    assert float((single - exact).abs().max()) <= (grid / 2 + 2**-24 * 8) / DIVISOR


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e5])
def test_the_sum_lies_on_the_grid(kernel_device, impl, scale):
    """Otherwise the low bits of the total, which the noise does not reach, would come out."""
    total = scale * totals(4000, F64)
    device = kernel_device if impl == "triton" else "cpu"
    got = run(total, F64, device, std=0.25, divisor=1, impl=impl)
    steps = got * 2**22
    assert torch.equal(steps, steps.round())
    assert not torch.equal(steps, (steps / 2).round() * 2)


def test_rounding_does_not_shift_the_mean():
    total = torch.full((N,), 1.37, dtype=F64)
    error = run(total, F64, std=1, divisor=1) - total - normals(N, 0)
    grid = 2.0**-20
    assert abs(float(error.mean())) < 4 * grid / math.sqrt(12 * N)
    assert float(error.var()) == pytest.approx(grid**2 / 12, rel=0.01)


@pytest.mark.parametrize("std", [2.0**-126, 1e-30, 1.0, 1e30, 2.0**126])
def test_extreme_scales(std):
    z = run(torch.zeros(4096), F64, std=std, divisor=2.0**-126) * 2.0**-126 / std
    assert float((z - normals(4096, 0)).abs().max()) <= 2.0**-21 * (1 + 1e-9)


def test_bits_of_numbers():
    values = [1.0, 2.0**-126, 1e300, 0.1]
    expected = np.array(values).view(np.int64).tolist()
    assert [double_bits(value) for value in values] == expected


# --- statistics ---------------------------------------------------------------------------------


def draw(n: int = N, **changes: Any) -> Tensor:
    options = {"key": KEY, "step": 3, "uid": 8, "domain": 0, "std": 1, "divisor": 1, **changes}
    out = torch.zeros(n, dtype=F64)
    gaussian_step(out, out, **options)
    return out


def sigmas(sample_mean: Tensor, variance: float, n: int) -> float:
    return abs(float(sample_mean)) * math.sqrt(n / variance)


def test_moments():
    z = draw(1 << 22)
    assert sigmas(z.mean(), 1, len(z)) < 4
    assert sigmas((z**2).mean() - 1, 2, len(z)) < 4
    assert sigmas((z**3).mean(), 15, len(z)) < 4
    assert sigmas((z**4).mean() - 3, 96, len(z)) < 4


def test_moments_scale():
    z = draw(std=0.3, divisor=64) * 64 / 0.3
    assert sigmas((z**2).mean() - 1, 2, N) < 4


@pytest.mark.parametrize("lane", range(8))
def test_each_lane_is_normal(lane):
    z = draw().view(-1, 8, 256)[:, lane].flatten().sort().values
    n = len(z)
    assert sigmas(z.mean(), 1, n) < 4
    assert sigmas((z**2).mean() - 1, 2, n) < 4
    assert sigmas((z**4).mean() - 3, 96, n) < 4
    cdf = torch.special.ndtr(z)
    steps = torch.arange(n + 1, dtype=F64) / n
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    assert math.sqrt(n) * distance < KOLMOGOROV_FOUR_SIGMA


def test_tails():
    z = draw(1 << 22).abs()
    for bound in (3.0, 4.0, 4.5):
        expected = len(z) * math.erfc(bound / math.sqrt(2))
        assert abs(int((z > bound).sum()) - expected) < 4 * math.sqrt(expected)
    assert float(z.max()) < 9.493


OTHER = {
    "key": {"key": key_from_seed(8)},
    "step": {"step": 4},
    "high step": {"step": 3 + (1 << 32)},
    "parameter": {"uid": 9},
    "domain": {"domain": 1},
    "next block": {"start": 1},
    "block beyond 32 bits": {"start": 1 << 35},
}


@pytest.mark.parametrize("other", OTHER)
def test_streams_are_uncorrelated(other):
    a, b = draw(), draw(**OTHER[other])
    assert sigmas((a * b).mean(), 1, N) < 4
    assert sigmas(((a**2 - 1) * (b**2 - 1)).mean(), 4, N) < 4


@pytest.mark.parametrize("lag", [1, 2, 8, 255, 256, 512, 1024, 1792, 2048, 4096])
def test_elements_are_uncorrelated(lag):
    """Lags of one row reach the partner of a Box-Muller pair, and larger ones other blocks."""
    z = draw()
    a, b = z[:-lag], z[lag:]
    assert sigmas((a * b).mean(), 1, len(a)) < 4
    assert sigmas(((a**2 - 1) * (b**2 - 1)).mean(), 4, len(a)) < 4


def test_low_bits_of_the_grid_are_uniform():
    steps = (draw() * 2**20).long()
    for bits in (1, 2, 4):
        counts = torch.bincount(steps & ((1 << bits) - 1), minlength=1 << bits).double()
        cells, expected = 1 << bits, N / (1 << bits)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - (cells - 1)) < 4 * math.sqrt(2 * (cells - 1)) + 4


# --- the op, its arguments, its imports ---------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "numba", "triton"])
@pytest.mark.parametrize("in_place", [False, True])
def test_op_checklist(kernel_device, impl, in_place):
    device = kernel_device if impl == "triton" else "cpu"

    def make_args(n):
        total = totals(n).to(device)
        out = total if in_place else torch.full_like(total, math.nan)
        source = None if in_place else total
        more = totals(n + 5, F64, seed=1).to(device)
        outs, sources = [out, torch.full_like(more, math.nan).float()], [source, more]
        return outs, sources, KEY.clone(), 5, [6, 9], 1, [STD, 0.0], DIVISOR, [2000, 3], impl

    sizes = [97, 2049] if impl == "triton" else [4099, 1, 2047, 2049]
    check_op(gaussian_steps_, make_args, sizes=sizes)


BAD = {
    "total dtype": ({"total": totals(4).half()}, TypeError, "total: expected float32 or float64"),
    "total shape": ({"total": totals(4).view(2, 2)}, ValueError, r"total: expected shape \(any"),
    "total layout": ({"total": totals(8)[::2]}, ValueError, r"total: expected a contiguous"),
    "total autograd": ({"total": totals(4).requires_grad_()}, ValueError, "total: .*detach"),
    "out dtype": ({"out": torch.zeros(4, dtype=torch.int32)}, TypeError, "out: expected float32"),
    "out shape": ({"out": torch.zeros(5)}, ValueError, r"out: expected shape \(4,\)"),
    "key dtype": ({"key": KEY.long()}, TypeError, "key: expected int32, got int64"),
    "key shape": ({"key": KEY[:7].clone()}, ValueError, r"key: expected shape \(8,\)"),
    "key device": ({"key": KEY.to("meta")}, ValueError, "key: expected device cpu, got .* on meta"),
    "step": ({"step": 1 << 40}, ValueError, r"step: expected an integer in \[0, 1099511627776\)"),
    "step type": ({"step": 1.0}, TypeError, "step: expected an integer, got float"),
    "uid": ({"uid": -1}, ValueError, "uid: expected an integer in .*number the parameters"),
    "domain": ({"domain": 256}, ValueError, r"domain: expected an integer in \[0, 256\)"),
    "start": ({"start": (1 << 51) - 3}, ValueError, "start: expected an integer in"),
    "std": ({"std": -1.0}, ValueError, r"std: expected 0 or a number in \[2\^-126, 2\^126\], got"),
    "std nan": ({"std": math.nan}, ValueError, "std: expected 0 or a number in"),
    "std tiny": ({"std": 1e-300}, ValueError, "std: expected 0 or a number in"),
    "std type": ({"std": torch.ones(())}, TypeError, "std: expected a number, got float32"),
    "divisor": ({"divisor": 0}, ValueError, r"divisor: expected a number in \[2\^-126"),
    "divisor infinite": ({"divisor": math.inf}, ValueError, "divisor: expected a number in"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of auto"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    arguments = {"total": totals(4), "out": torch.zeros(4), **STREAM, "std": 1.0, "divisor": 2.0}
    arguments.update(change)
    with pytest.raises(error, match=message):
        gaussian_step(arguments.pop("total"), arguments.pop("out"), **arguments)


@pytest.mark.parametrize("shift", [-1, 1])
def test_partial_overlap_is_refused(shift):
    buffer = torch.zeros(100)
    total, out = buffer[1:91], buffer[1 + shift : 91 + shift]
    with pytest.raises(ValueError, match="out: expected total itself, or memory apart"):
        gaussian_step(total, out, **STREAM, std=1, divisor=1)
    bits = buffer.view(BF16)
    with pytest.raises(ValueError, match="out: expected total itself, or memory apart"):
        gaussian_step(buffer, bits[:100], **STREAM, std=1, divisor=1)
    gaussian_step(buffer[:50], buffer[50:], **STREAM, std=1, divisor=1)


def test_importing_loads_no_compiler():
    assert_does_not_load(
        "import shared_kernels.ops.dp, shared_kernels.random.chacha", ("triton", "numba")
    )
    call = (
        "import torch\n"
        "from shared_kernels.ops.dp import gaussian_step\n"
        "from shared_kernels.random.chacha import new_key\n"
        "x = torch.zeros(1)\n"
        "gaussian_step(x, x, key=new_key(), step=0, uid=0, std=1, divisor=1)"
    )
    assert "numba" in modules_loaded_by(call)


# --- the benchmark file -------------------------------------------------------------------------

BENCHMARK = Path(shared_kernels.__file__).parents[2] / "benchmarks" / "dp_noise.py"
needs_checkout = pytest.mark.skipif(not BENCHMARK.is_file(), reason="needs the checkout")


@pytest.fixture
def workloads(monkeypatch):
    functions = load_benchmarks(BENCHMARK)
    for function in functions.values():
        monkeypatch.setitem(function.__globals__, "_elements", lambda device: 1 << 15)
    return functions["gaussian_step"]


@pytest.fixture
def ceilings():
    made = Ceilings("cpu")
    made._measured["device_copy"] = 1e9
    return made


ONCE = Plan(warmup=1, min_rounds=1, max_rounds=1)


@needs_checkout
def test_workloads_pass_their_gates_and_run(workloads, ceilings):
    made = list(workloads("cpu"))
    assert len({workload.name for workload in made}) == len(made) > 1
    for workload in made:
        result = run_workload(workload, ceilings, ONCE)
        assert all(arm["error"] is None and arm["limit"] for arm in result["arms"])


@needs_checkout
def test_wrong_noise_does_not_pass_the_gate(workloads, ceilings, monkeypatch):
    from shared_kernels.ops import dp

    right = dp.gaussian_step

    def shifted(total, out, *, start=0, impl="auto", **options):
        right(total, out, start=start + (impl == "auto"), impl=impl, **options)

    monkeypatch.setattr(dp, "gaussian_step", shifted)
    with pytest.raises(GateError, match="Mismatched elements"):
        run_workload(next(workloads("cpu")), ceilings, ONCE)
