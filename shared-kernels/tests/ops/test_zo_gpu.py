"""zo_materialize on a GPU: what the interpreter cannot show."""

import pytest
import torch
from shared_kernels import _autotune
from shared_kernels.ops.zo import (
    TILE,
    Perturbation,
    Segment,
    build_tile_table,
    zo_materialize,
    zo_replay,
)
from shared_kernels.ops.zo.op import CONFIGS
from shared_kernels.testing import assert_same_bits
from torch import Tensor

pytestmark = pytest.mark.gpu

PERTURB = Perturbation(seed=(1 << 63) + 7, direction=2, eps=1e-3)
SEGMENTS = [Segment(1, 70_001, True), Segment(2, 33 * TILE, False, 8 * TILE)]
STORES = ["fp32", "bf16", "bf16x2"]
OUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(store: str, segments=SEGMENTS, records: int = 2) -> tuple[Tensor, Tensor | None, tuple]:
    """Return master, lo and (tiles, keys, coefs) on the CPU."""
    g = torch.Generator().manual_seed(0)
    tiles = build_tile_table(segments)
    numel = len(tiles) * TILE
    master = torch.randn(numel, generator=g) * 0.02
    master[:4] = torch.tensor([float("inf"), -0.0, 1e-42, 3.4e38])
    lo = None
    if store != "fp32":
        master = master.bfloat16()
    if store == "bf16x2":
        lo = torch.randint(-(1 << 15), 1 << 15, (numel,), generator=g).to(torch.int16)
    keys = torch.randint(-(1 << 31), 1 << 31, (records, 3), generator=g).to(torch.int32)
    keys[:, 2] &= 0xFFFFFF
    coefs = torch.randn(records, 2, generator=g) * 0.01
    coefs[:, 0] += 1
    return master, lo, (tiles, keys, coefs)


def run(device: str, impl: str, store: str, dist: str, dtype: torch.dtype, rounding: str):
    master, lo, rest = make(store)
    master = master.to(device)
    lo = None if lo is None else lo.to(device)
    plus = torch.full((len(master),), float("nan"), dtype=dtype, device=device)
    minus = plus.clone()
    zo_materialize(
        master,
        *(t.to(device) for t in rest),
        lo=lo,
        perturb=PERTURB,
        plus=plus,
        minus=minus,
        fold=True,
        rounding=rounding,
        dither_seed=-77,
        dist=dist,
        impl=impl,
    )
    return [t.cpu() for t in (master, lo, plus, minus) if t is not None]


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize("store", STORES)
def test_gpu_is_the_reference_and_numba_bit_for_bit(cuda, monkeypatch, store, dtype, dist):
    monkeypatch.setenv("SHARED_KERNELS_STRICT", "1")
    for rounding in ("nearest", "stochastic") if store == "bf16" else ("nearest",):
        options = (store, dist, dtype, rounding)
        expected = run("cpu", "reference", *options)
        for got in (run(cuda, "auto", *options), run(cuda, "auto", *options)):
            for a, b in zip(got, expected, strict=True):
                assert_same_bits(a, b)
        for a, b in zip(run(cuda, "reference", *options), expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("config", range(len(CONFIGS)))
@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
def test_every_configuration_gives_the_same_bits(cuda, monkeypatch, dist, config):
    monkeypatch.setattr("shared_kernels.ops.zo.op.CONFIGS", (CONFIGS[config],))
    options = ("bf16", dist, torch.bfloat16, "stochastic")
    for a, b in zip(run(cuda, "triton", *options), run("cpu", "auto", *options), strict=True):
        assert_same_bits(a, b)


def test_tuning_does_not_apply_a_fold_twice(cuda, monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "full")
    monkeypatch.setattr(_autotune, "_measured", {})
    first = run(cuda, "triton", "bf16x2", "gaussian", torch.bfloat16, "nearest")
    assert len(_autotune._measured) == 1
    second = run(cuda, "triton", "bf16x2", "gaussian", torch.bfloat16, "nearest")
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_replay_of_thousands_of_records(cuda):
    master, _, rest = make("fp32", [Segment(3, 20_000, True)], records=3000)
    gpu = master.to(cuda)
    zo_replay(gpu, *(t.to(cuda) for t in rest), dist="gaussian")
    zo_replay(master, *rest, dist="gaussian")
    assert_same_bits(gpu.cpu(), master)


def test_rows_of_any_alignment_share_one_compilation(cuda, monkeypatch):
    """Each step takes its rows at another address; a compilation would stop it for a second."""
    import triton

    master, _, (tiles, keys, coefs) = make("fp32", records=9)
    master, tiles, keys, coefs = (t.to(cuda) for t in (master, tiles, keys, coefs))
    plus = torch.empty_like(master)

    def step(row: int) -> None:
        rows = slice(row, row + 1)
        zo_materialize(master, tiles, keys[rows], coefs[rows], perturb=PERTURB, plus=plus)

    step(0)
    compiled = []
    hook = lambda *args, **kwargs: compiled.append(kwargs["repr"])  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    for row in range(1, 9):
        step(row)
    assert not compiled


def test_capture_in_a_graph(cuda):
    master, _, rest = make("fp32")
    master, rest = master.to(cuda), [t.to(cuda) for t in rest]
    plus, expected = torch.empty_like(master), torch.empty_like(master)
    zo_materialize(master, *rest, perturb=PERTURB, plus=expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        zo_materialize(master, *rest, perturb=PERTURB, plus=plus)
    # a coefficient is read when the graph runs, not when it is captured
    graph.replay()
    assert_same_bits(plus, expected)
    rest[2][:, 1] += 1
    graph.replay()
    assert not torch.equal(plus, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
def test_more_than_two_to_the_31_elements(cuda, dist):
    numel = (1 << 31) + 3 * TILE + 5
    tiles = build_tile_table([Segment(9, numel, True)], device=cuda)
    padded = len(tiles) * TILE
    master = torch.zeros(padded, dtype=torch.bfloat16, device=cuda)
    plus = torch.empty(padded, dtype=torch.bfloat16, device=cuda)
    keys = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=cuda)
    coefs = torch.tensor([[1.0, 0.5]], device=cuda)
    zo_materialize(master, tiles, keys, coefs, perturb=PERTURB, plus=plus, fold=True, dist=dist)
    tail = 5 * TILE
    start = padded - tail
    expected_master = torch.zeros(tail, dtype=torch.bfloat16)
    expected_plus = torch.empty(tail, dtype=torch.bfloat16)
    zo_materialize(
        expected_master,
        build_tile_table([Segment(9, numel - start, True, start)]),
        keys.cpu(),
        coefs.cpu(),
        perturb=PERTURB,
        plus=expected_plus,
        fold=True,
        dist=dist,
        impl="reference",
    )
    assert_same_bits(master[start:].cpu(), expected_master)
    assert_same_bits(plus[start:].cpu(), expected_plus)
