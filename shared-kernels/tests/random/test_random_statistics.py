"""The streams are what they claim: moments, distribution and independence within four sigma."""

import math

import pytest
import torch
from shared_kernels.random import derive_seed, noise, param_uid

N = 1 << 20
BASE = {"seed": derive_seed(1, 0), "uid": param_uid("layer.0.weight"), "direction": 0}
#: Kolmogorov's distribution exceeds this with the two-sided probability of four sigma.
KOLMOGOROV_FOUR_SIGMA = 2.28


def draw(dist="gaussian", n=N, **changes):
    return noise(n, dist=dist, **{**BASE, **changes}).double()


def sigmas(sample_mean: torch.Tensor, variance: float, n: int) -> float:
    return abs(float(sample_mean)) * math.sqrt(n / variance)


@pytest.mark.parametrize("direction", range(3))
def test_gaussian_moments(direction):
    z = draw(direction=direction)
    assert sigmas(z.mean(), 1, N) < 4
    assert sigmas((z**2).mean() - 1, 2, N) < 4
    assert sigmas((z**3).mean(), 15, N) < 4
    assert sigmas((z**4).mean() - 3, 96, N) < 4


@pytest.mark.parametrize("lane", range(4))
def test_gaussian_moments_of_each_lane(lane):
    """The two outputs of a Box-Muller pair are each normal, not only their mixture."""
    z = draw().view(-1, 4, 256)[:, lane].flatten()
    assert sigmas(z.mean(), 1, len(z)) < 4
    assert sigmas((z**2).mean() - 1, 2, len(z)) < 4
    assert sigmas((z**4).mean() - 3, 96, len(z)) < 4


@pytest.mark.parametrize("lane", range(4))
def test_gaussian_kolmogorov_smirnov(lane):
    z = draw().view(-1, 4, 256)[:, lane].flatten().sort().values
    n = len(z)
    cdf = torch.special.ndtr(z)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    assert math.sqrt(n) * distance < KOLMOGOROV_FOUR_SIGMA


def test_gaussian_tails():
    n = 1 << 22
    z = draw(n=n).abs()
    for bound in (3.0, 4.0, 4.5):
        expected = n * math.erfc(bound / math.sqrt(2))
        assert abs(int((z > bound).sum()) - expected) < 4 * math.sqrt(expected)


def test_rademacher_moments():
    z = draw("rademacher")
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert sigmas(z.mean(), 1, N) < 4
    for bit in range(16):
        row = z.view(-1, 16, 256)[:, bit].flatten()
        assert sigmas(row.mean(), 1, len(row)) < 4


OTHER = {
    "parameter": {"uid": param_uid("layer.1.weight")},
    "step": {"seed": derive_seed(1, 1)},
    "run": {"seed": derive_seed(2, 0)},
    "direction": {"direction": 1},
}


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("other", OTHER)
def test_streams_are_uncorrelated(dist, other):
    a, b = draw(dist), draw(dist, **OTHER[other])
    assert sigmas((a * b).mean(), 1, N) < 4
    if dist == "gaussian":
        assert sigmas(((a**2 - 1) * (b**2 - 1)).mean(), 4, N) < 4


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("lag", [1, 2, 8, 255, 256, 512, 768, 1024, 4096])
def test_elements_are_uncorrelated(dist, lag):
    """Lags of one row reach the partner of a Box-Muller pair, and larger ones other blocks."""
    z = draw(dist)
    a, b = z[:-lag], z[lag:]
    assert sigmas((a * b).mean(), 1, len(a)) < 4
    if dist == "gaussian":
        assert sigmas(((a**2 - 1) * (b**2 - 1)).mean(), 4, len(a)) < 4
