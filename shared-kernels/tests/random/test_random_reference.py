"""The definition of the streams against known answers, exact arithmetic and float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from shared_kernels.random import constants as k
from shared_kernels.random import derive_seed, derive_seeds, noise, param_uid, philox4x32, reference
from shared_kernels.testing import TOLERANCES

# kat_vectors of the Random123 distribution, philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32(words(counter), words(key)).tolist() == words(expected).tolist()


def philox_int(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        low = (1 << 32) - 1
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def test_philox_broadcasts_the_key_and_matches_integers():
    counters = torch.randint(0, 1 << 32, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    key = [0xDEADBEEF, 0x12345678]
    drawn = philox4x32(counters, torch.tensor(key))
    assert drawn.shape == counters.shape
    expected = [[philox_int(c, key) for c in row] for row in counters.tolist()]
    assert drawn.tolist() == expected


def block(index: int, uid: int, direction: int, seed: int, domain: int = 0) -> list[int]:
    low = (1 << 32) - 1
    counter = [index & low, index >> 32, uid, direction | domain << 24]
    return philox_int(counter, [seed & low, seed >> 32])


def normal_at(e: int, uid: int, direction: int, seed: int) -> float:
    """Element of the gaussian stream, by the layout's closed form and float64 trigonometry."""
    w = block((e >> 10) * 256 + (e & 255), uid, direction, seed)
    lane = (e >> 8) & 3
    w_a, w_b = w[lane & 2], w[(lane & 2) + 1]
    radius = math.sqrt(-2 * math.log(float(np.float32(w_a >> 1)) / 2**31 + 2.0**-32))
    low30 = w_b & 0x3FFFFFFF
    r = (low30 - (1 << 30) if low30 >= 1 << 29 else low30) / 2**30
    cosine, sine = math.cos(math.pi / 2 * r), math.sin(math.pi / 2 * r)
    cosine = -cosine if w_b >> 31 else cosine
    pair = (sine, cosine) if (w_b >> 30) & 1 else (cosine, sine)
    return radius * pair[lane & 1]


def sign_at(e: int, uid: int, direction: int, seed: int) -> int:
    row, column = (e >> 8) & 15, e & 255
    w = block((e >> 12) * 32 + (column >> 3), uid, direction, seed)
    return 1 if (w[row >> 2] >> (8 * (row & 3) + (column & 7))) & 1 else -1


def dither_at(e: int, uid: int, seed: int) -> int:
    row, column = (e >> 8) & 7, e & 255
    word = block((e >> 11) * 256 + column, uid, 0, seed, domain=1)[row >> 1]
    return word >> 16 if row & 1 else word & 0xFFFF


STARTS = [0, 4096 * 5, 4096 << 32]


@pytest.mark.parametrize("start", STARTS)
def test_gaussian_layout(start):
    uid, direction, seed = 0xFEDCBA98, 0xABCDEF, 0x0123456789ABCDEF
    drawn = noise(
        4096, seed=seed, uid=uid, direction=direction, start=start, impl="reference"
    ).tolist()
    for e in range(0, 4096, 37):
        assert drawn[e] == pytest.approx(normal_at(start + e, uid, direction, seed), rel=2e-6)


@pytest.mark.parametrize("start", STARTS)
def test_rademacher_layout(start):
    uid, direction, seed = 7, 3, (1 << 64) - 5
    drawn = noise(
        4096,
        seed=seed,
        uid=uid,
        direction=direction,
        dist="rademacher",
        start=start,
        impl="reference",
    ).tolist()
    assert drawn == [sign_at(start + e, uid, direction, seed) for e in range(4096)]


@pytest.mark.parametrize("start", STARTS)
def test_dither_layout(start):
    uid, seed = 0x80000001, 0xFFFFFFFF00000001
    drawn = reference.dither_tiles(
        torch.tensor([uid]), torch.tensor([start]), reference.split_seed(seed)
    )
    assert drawn[0].tolist() == [dither_at(start + e, uid, seed) for e in range(4096)]


def round_to_float32(exact: Fraction) -> np.float32:
    """Correctly rounded float32 of a fraction: the nearest of three candidates, ties to even."""
    near = np.float32(float(exact))
    candidates = [
        np.nextafter(near, np.float32(-np.inf)),
        near,
        np.nextafter(near, np.float32(np.inf)),
    ]
    even = lambda x: int(np.float32(x).view(np.int32)) & 1  # noqa: E731
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), even(x)))


def test_fma_rounds_once():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 2000, generator=g)
    # c near -ab makes cancellation; c much larger or smaller makes near-ties in float64
    scale = torch.tensor([1.0, -1.0, 2.0**-24, 2.0**24, 2.0**-40]).repeat(400)
    c = (-(a * b) * scale * (1 + torch.randn(2000, generator=g) * 2.0**-20)).float()
    # products of numbers with few bits plus half an ulp: exact ties and their neighbours
    a = torch.cat([a, torch.full((4,), 1 + 2.0**-12)])
    b = torch.cat([b, torch.full((4,), 1 + 2.0**-12)])
    c = torch.cat([c, torch.tensor([2.0**24, 2.0**24 + 2, 2.0**-100, -(2.0**-100)])])
    got = reference.fma(a, b, c).tolist()
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), got, strict=True):
        assert value == round_to_float32(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)


def test_fma_is_not_rounded_twice():
    # a b = 2^-24 - 2^-70; float64 loses the last term, and 1 + 2^-23 + 2^-24 is a tie that goes up
    a, b = torch.tensor([(1 - 2.0**-23) * 2.0**-24]), torch.tensor([1 + 2.0**-23])
    c = torch.tensor([1 + 2.0**-23])
    assert (a.double() * b.double() + c.double()).float().item() == 1 + 2.0**-22
    assert reference.fma(a, b, c).item() == 1 + 2.0**-23


def in_ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    spacing = torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()
    return float(((actual.double() - exact) / spacing).abs().max())


def test_minus_two_log_against_float64():
    g = torch.Generator().manual_seed(2)
    near_one = 1 - torch.arange(1, 1 << 18) * 2.0**-24
    tiny = torch.arange(1, 1 << 12) * 2.0**-32
    uniform = torch.rand(1 << 18, generator=g) * (1 - 2.0**-20) + 2.0**-30
    u = torch.cat([near_one.float(), tiny.float(), uniform])
    error = in_ulps(reference.minus_two_log(u), -2 * u.double().log())
    assert error <= TOLERANCES["random.minus_two_log/float64"].ulps


def test_minus_two_log_of_one_is_positive_zero():
    zero = reference.minus_two_log(torch.ones(1))
    assert zero.item() == 0.0
    assert not zero.signbit().item()


def test_sine_and_cosine_against_float64():
    r = torch.arange(-(1 << 18), (1 << 18) + 1) / 2.0**19
    # radius sqrt(-2 ln u) is one element's; word 0 gives the largest radius for all
    angle = ((r * 2.0**30).long()) & 0x3FFFFFFF
    first, second = reference.box_muller(torch.zeros_like(angle), angle)
    radius = math.sqrt(64 * math.log(2))
    r = torch.where(r == 0.5, -0.5, r).double()
    bound = (TOLERANCES["random.sincos/float64"].ulps + 2) * 2.0**-23
    for got, exact in ((first, torch.cos), (second, torch.sin)):
        expected = radius * exact(math.pi / 2 * r)
        assert bool(((got.double() - expected).abs() <= bound * expected.abs() + 1e-12).all())


@pytest.mark.parametrize("top", range(4))
def test_every_quadrant_is_reached(top):
    """Bits 31 and 30 of the angle word pick the quadrant."""
    angle = torch.tensor([(top << 30) | 0x10000000])
    first, second = reference.box_muller(torch.zeros(1, dtype=torch.int64), angle)
    cosine, sine = math.cos(math.pi / 8), math.sin(math.pi / 8)
    radius = math.sqrt(64 * math.log(2))
    expected = {0: (cosine, sine), 2: (-cosine, sine), 1: (sine, cosine), 3: (sine, -cosine)}[top]
    assert (first.item() / radius, second.item() / radius) == pytest.approx(expected, rel=1e-6)


def test_param_uid_is_blake2s():
    # a change of these two would orphan every update log written before
    assert param_uid("lm_head.weight") == 0x23CE0CB5
    assert param_uid("model.layers.0.mlp.up_proj.weight") == 0x5BF16F49


def test_derive_seed_is_philox_in_its_own_domain():
    run_seed, step = 0x1122334455667788, (7 << 32) | 9
    w = philox_int([9, 7, 0, 2 << 24], [0x55667788, 0x11223344])
    assert derive_seed(run_seed, step) == w[0] | w[1] << 32
    assert derive_seed(-1, 0) == derive_seed((1 << 64) - 1, 0)
    assert len({derive_seed(0, step) for step in range(1000)}) == 1000


def test_derive_seeds_is_derive_seed_of_a_range():
    first = (1 << 32) - 2
    seeds = derive_seeds(-3, first, 5)
    assert seeds.dtype == np.uint64
    assert seeds.tolist() == [derive_seed(-3, first + i) for i in range(5)]
    assert derive_seeds(0, 0, 0).shape == (0,)


def test_constants_are_float32():
    for value in (*k.LOG_Q, *k.SIN_S, *k.COS_C, k.MINUS_TWO_LN2, k.TWO_M31, k.TWO_M32):
        assert float(np.float32(value)) == value
