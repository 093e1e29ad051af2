"""Stores: the exact bf16x2 pair, unbiased stochastic rounding, and what nearest rounding loses."""

import pytest
import torch
from shared_kernels.ops.zo import (
    TILE,
    Perturbation,
    Segment,
    build_tile_table,
    zo_materialize,
    zo_replay,
)
from shared_kernels.ops.zo.reference import join_bf16x2, round_stochastic, split_bf16x2
from shared_kernels.random import derive_seed
from shared_kernels.testing import assert_same_bits

NO_KEYS = torch.empty(0, 3, dtype=torch.int32)
NO_COEFS = torch.empty(0, 2)
TIES = (torch.arange(1 << 16) << 16) + 0x8000


def floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def random_floats(n: int, seed: int) -> torch.Tensor:
    """Finite floats with uniformly random bits."""
    y = floats(torch.randint(0, 1 << 32, (n,), generator=torch.Generator().manual_seed(seed)))
    return torch.where(y.isfinite(), y, 0.0)


def test_bf16x2_is_lossless_on_random_bits_and_ties():
    for chunk in range(16):
        y = random_floats(1 << 20, chunk)
        assert_same_bits(join_bf16x2(*split_bf16x2(y)), y)
    ties = floats(torch.cat([TIES - 1, TIES, TIES + 1]))
    ties = ties[~ties.isnan()]
    hi, lo = split_bf16x2(ties)
    assert torch.equal(join_bf16x2(hi, lo).view(torch.int32), ties.view(torch.int32))


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_a_nan_is_a_nan_in_its_upper_half_too(impl):
    # 0x7FFFFFFF is what a GPU makes: rounded up, its upper half alone would be -0.
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFFC00000])
    hi, lo = split_bf16x2(floats(bits))
    assert bool(hi.isnan().all())
    assert bool(join_bf16x2(hi, lo).isnan().all())
    master, low = torch.zeros(TILE, dtype=torch.bfloat16), torch.zeros(TILE, dtype=torch.int16)
    keys = torch.zeros(1, 3, dtype=torch.int32)
    tiles = build_tile_table([Segment(1, TILE, True)])
    coefs = torch.tensor([[1.0, float("nan")]])
    zo_materialize(
        master, tiles, keys, coefs, perturb=None, fold=True, lo=low, dist="rademacher", impl=impl
    )
    assert bool(master.isnan().all())


def test_bf16x2_high_half_is_the_rounded_value():
    y = random_floats(1 << 18, 99)
    y = y[(y.abs() < 1e38) & (y.view(torch.int32) & 0xFFFF != 0x8000)]
    assert_same_bits(split_bf16x2(y)[0], y.bfloat16())


def test_folding_nothing_keeps_a_bf16x2_pair_and_shows_its_value():
    y = random_floats(4 * TILE, 5)
    hi, lo = split_bf16x2(y)
    master, low, plus = hi.clone(), lo.clone(), torch.empty_like(y)
    tiles = build_tile_table([Segment(1, 4 * TILE, True)])
    zo_materialize(master, tiles, NO_KEYS, NO_COEFS, perturb=None, plus=plus, fold=True, lo=low)
    assert_same_bits(master, hi)
    assert torch.equal(low, lo)
    assert_same_bits(plus, y)


@pytest.mark.parametrize("impl", ["reference", "numba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_round_ties_to_even(impl, dtype):
    below = torch.float16 if dtype == torch.float16 else torch.bfloat16
    grid = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(below).float()
    grid = grid[grid.isfinite()]
    grid = grid.sort().values
    y = torch.cat([grid, ((grid[1:].double() + grid[:-1].double()) / 2).float()])
    y = torch.cat([y, torch.full((-len(y) % TILE,), 1e30)])
    plus = torch.empty(len(y), dtype=dtype)
    tiles = build_tile_table([Segment(1, len(y), True)])
    zo_materialize(y, tiles, NO_KEYS, NO_COEFS, perturb=None, plus=plus, impl=impl)
    assert_same_bits(plus, y.to(dtype))


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_stochastic_rounding_keeps_what_is_not_finite_and_what_is_exact(impl):
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5, -(2.0**-130)]
    master = torch.tensor(special * 1000).bfloat16()[:TILE].clone()
    before = master.clone()
    tiles = build_tile_table([Segment(1, TILE, True)])
    zo_replay(master, tiles, NO_KEYS, NO_COEFS, rounding="stochastic", dither_seed=3, impl=impl)
    assert_same_bits(master, before)


def test_stochastic_rounding_of_nan_with_a_low_payload_is_nan():
    y = floats(torch.tensor([0x7F800001, 0xFF80FFFF]))
    assert bool(round_stochastic(y, torch.zeros(2, dtype=torch.int64)).isnan().all())


def test_dither_depends_on_its_seed():
    tiles = build_tile_table([Segment(1, TILE, True)])
    keys, coefs = torch.tensor([[1, 2, 0]], dtype=torch.int32), torch.tensor([[1.0, 1e-4]])
    folded = []
    for seed in (1, 2):
        master = torch.ones(TILE, dtype=torch.bfloat16)
        zo_replay(master, tiles, keys, coefs, rounding="stochastic", dither_seed=seed)
        folded.append(master)
    assert not torch.equal(*folded)


def drift(rounding: str, steps: int = 320, scale: float = 5e-6) -> tuple[torch.Tensor, ...]:
    """Fold small updates into a bfloat16 store; return start, true and stored displacement."""
    n = 1 << 20
    tiles = build_tile_table([Segment(11, n, False)])
    start = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    stored, true = start.clone(), torch.zeros(n)
    for step in range(steps):
        seed = derive_seed(7, step)
        words = [seed & 0xFFFFFFFF, seed >> 32, 0]
        keys = torch.tensor([words]).to(torch.int32)
        coefs = torch.tensor([[1.0, scale]])
        zo_replay(stored, tiles, keys, coefs, rounding=rounding, dither_seed=seed)
        zo_replay(true, tiles, keys, coefs)
    return start.double(), true.double(), stored.double() - start.double()


def test_stochastic_folds_are_unbiased_and_follow_the_noise_law():
    """Specification 1.4: each fold adds the variance E|u| ulp, u being one step's change."""
    steps, scale = 320, 5e-6
    start, true, moved = drift("stochastic", steps, scale)
    slope = float((true * moved).sum() / (true * true).sum())
    assert slope == pytest.approx(1, abs=0.02)
    # Bernoulli between two neighbours at distance ulp: variance f (1 - f) ulp^2, f = |u| / ulp.
    # Values below 2^-9 are left out: there u is no longer small against ulp.
    large = start.abs() > 2.0**-9
    error = (moved - true)[large]
    ulp = torch.exp2(start[large].abs().log2().floor() - 7)
    mean_abs_u = scale * (2 / torch.pi) ** 0.5
    predicted = steps * (mean_abs_u * ulp - scale**2).mean()
    assert float(error.square().mean()) == pytest.approx(float(predicted), rel=0.1)


def test_nearest_folds_lose_small_updates():
    """The negative control: most of the displacement never arrives."""
    _, true, moved = drift("nearest")
    slope = float((true * moved).sum() / (true * true).sum())
    assert 0.05 < slope < 0.25


def test_perturbation_survives_where_the_master_is_exact():
    """plus - minus is 2 eps z to float32 rounding, and z is the same in both."""
    n = 4 * TILE
    master, plus, minus = torch.zeros(n), torch.empty(n), torch.empty(n)
    tiles = build_tile_table([Segment(1, n, False)])
    perturb = Perturbation(1, 0, 2.0**-10)
    zo_materialize(master, tiles, NO_KEYS, NO_COEFS, perturb=perturb, plus=plus, minus=minus)
    assert_same_bits(minus, -plus)
    assert float(plus.std()) == pytest.approx(2.0**-10, rel=0.02)
