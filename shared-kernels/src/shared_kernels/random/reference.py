"""Counter-based noise in plain torch: the definition of every stream.

The numba and Triton implementations must reproduce these functions bit for bit. Words are uint32
values held in int64 tensors. Noise is *defined* in float32: a fused multiply-add is therefore
emulated exactly, and every other operation is one IEEE float32 operation.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from shared_kernels.random import constants as k

_MASK = 0xFFFFFFFF
#: Tiles drawn at a time; bounds the temporaries of `noise` to a few hundred MiB.
_CHUNK_TILES = 256


def _mulhilo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2^64, so both halves of the product are right after masking
    product = a * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: Tensor, key: Tensor, rounds: int = k.PHILOX_ROUNDS) -> Tensor:
    """Apply the Philox4x32 bijection to blocks of four 32-bit words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), section 5.2;
    checked against the known answers of the authors' Random123 package.

    Args:
        counter: int64 ``(..., 4)`` holding uint32 values, least significant word first.
        key: int64 ``(..., 2)`` holding uint32 values, broadcast against ``counter``.
        rounds: Number of rounds; the streams of this package use 10.

    Returns:
        int64 ``(..., 4)`` holding uint32 values.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(rounds):
        hi0, lo0 = _mulhilo(c0, k.PHILOX_M0)
        hi1, lo1 = _mulhilo(c2, k.PHILOX_M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + k.PHILOX_W0) & _MASK, (k1 + k.PHILOX_W1) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Compute the correctly rounded float32 ``a * b + c``.

    The product of two float32 is exact in float64. The sum is rounded to odd there (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 2008), so that the second
    rounding, to float32, cannot go wrong.

    Args:
        a: float32 ``(...)``.
        b: float32 tensor broadcastable to ``a``, or a number exact in float32.
        c: As ``b``.

    Returns:
        float32 ``(...)``.
    """
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    away = (error > 0) == (total > 0)
    odd = torch.where(away, bits + 1, bits - 1)
    inexact_even = (error != 0) & (bits & 1 == 0) & torch.isfinite(total)
    return torch.where(inexact_even, odd, bits).view(torch.float64).float()


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = fma(value, x, c)
    return value


def _minus_two_log1p(f: Tensor, exponent: Tensor) -> Tensor:
    """Compute ``-2 ln((1 + f) 2^exponent)`` for f in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    tail = fma(f * f, _horner(f, k.LOG_Q), f * -2.0)
    return fma(exponent, k.MINUS_TWO_LN2, tail)


def minus_two_log(u: Tensor) -> Tensor:
    """Compute ``-2 ln u`` for positive normal float32 ``u``, within 1.5 ulp in (0, 1]."""
    shifted = u.view(torch.int32) - k.SQRT_HALF_BITS
    exponent = (shifted >> 23).float()
    mantissa = ((shifted & 0x7FFFFF) + k.SQRT_HALF_BITS).view(torch.float32)
    return _minus_two_log1p(mantissa - 1.0, exponent)


def gumbel(word: Tensor) -> Tensor:
    """Map uniform 32-bit words to standard Gumbel variables ``-ln(-ln(1 - v))``.

    ``v = (word + 1/2 up to rounding) / 2^32``, at most ``1 - 2^-24``. The largest variables, which
    decide an argmax, come from the smallest ``v``, where float32 is finest; ``1 - v`` is not
    rounded there.

    Args:
        word: int64 ``(...)`` holding uint32 values.

    Returns:
        float32 ``(...)``, between -2.9 and 22.2.
    """
    v = fma((word >> 1).float(), k.TWO_M31, k.TWO_M32).clamp(max=k.ONE_BELOW)
    w = 1.0 - v
    shifted = w.view(torch.int32) - k.SQRT_HALF_BITS
    mantissa = ((shifted & 0x7FFFFF) + k.SQRT_HALF_BITS).view(torch.float32)
    f = torch.where(shifted >= 0, -v, mantissa - 1.0)
    exponential = 0.5 * _minus_two_log1p(f, (shifted >> 23).float())
    return 0.5 * minus_two_log(exponential)


def box_muller(word_radius: Tensor, word_angle: Tensor) -> tuple[Tensor, Tensor]:
    """Map two uniform 32-bit words to two independent standard normals.

    ``u = (w_a + 1/2 up to rounding) / 2^32`` gives ``radius = sqrt(-2 ln u)``. The low 30 bits of
    ``w_b`` are a signed angle ``pi/2 r``, ``r`` in [-1/2, 1/2], around the positive x axis; bit 31
    flips the sign of the cosine and then bit 30 exchanges the two coordinates, which together reach
    the other three quadrants.

    Args:
        word_radius: int64 ``(...)`` holding uint32 values.
        word_angle: int64 ``(...)`` holding uint32 values.

    Returns:
        Two float32 ``(...)`` tensors.
    """
    u = fma((word_radius >> 1).float(), k.TWO_M31, k.TWO_M32)
    # through float64: torch.sqrt of float32 is not correctly rounded on every CPU
    radius = minus_two_log(u).double().sqrt().float()
    # the top two bits fall off: the remaining 30 are read as a signed number, scaled by 4
    signed = ((word_angle << 2) & _MASK).to(torch.int32)
    r = signed.float() * k.TWO_M32
    r2 = r * r
    sine = r * _horner(r2, k.SIN_S)
    cosine = fma(r2, _horner(r2, k.COS_C), 1.0)
    cosine = torch.where((word_angle >> 31) & 1 == 1, -cosine, cosine)
    swap = (word_angle >> 30) & 1 == 1
    first = torch.where(swap, sine, cosine)
    second = torch.where(swap, cosine, sine)
    return radius * first, radius * second


def block_words(
    blocks: Tensor, uid: Tensor, *, seed: Tensor, direction: Tensor, domain: int
) -> Tensor:
    """Draw the four words of each counter block.

    Args:
        blocks: int64 ``(tiles, n)`` block indices below 2^63.
        uid: int64 ``(tiles,)`` holding uint32 parameter identifiers.
        seed: int64 ``(2,)`` holding the low and the high 32 bits of the step seed.
        direction: int64 scalar below 2^24.
        domain: 0 for perturbation noise, 1 for rounding dither.

    Returns:
        int64 ``(tiles, n, 4)`` holding uint32 values.
    """
    last = (direction | (domain << k.DOMAIN_SHIFT)).to(blocks).expand_as(blocks)
    counter = torch.stack(
        [blocks & _MASK, blocks >> 32, uid[:, None].expand_as(blocks), last], dim=-1
    )
    return philox4x32(counter, seed)


def gaussian_tiles(uid: Tensor, start: Tensor, seed: Tensor, direction: Tensor) -> Tensor:
    """Draw standard normals for tiles of 4096 elements.

    Element ``e`` of a parameter lies in segment ``e // 1024``, lane ``(e // 256) % 4`` and column
    ``e % 256``; block ``segment * 256 + column`` yields its four lanes.

    Args:
        uid: int64 ``(tiles,)`` holding uint32 parameter identifiers.
        start: int64 ``(tiles,)``, first element of each tile, a multiple of 4096.
        seed: int64 ``(2,)`` holding uint32 values.
        direction: int64 scalar below 2^24.

    Returns:
        float32 ``(tiles, 4096)``.
    """
    per_tile = torch.arange(k.TILE // 4, device=uid.device)
    blocks = (start // 4)[:, None] + per_tile
    words = block_words(blocks, uid, seed=seed, direction=direction, domain=k.DOMAIN_NOISE)
    w = words.view(-1, k.TILE // k.GAUSSIAN_SEGMENT, k.COLUMNS, 4)
    n0, n1 = box_muller(w[..., 0], w[..., 1])
    n2, n3 = box_muller(w[..., 2], w[..., 3])
    return torch.stack([n0, n1, n2, n3], dim=2).reshape(-1, k.TILE)


def rademacher_tiles(uid: Tensor, start: Tensor, seed: Tensor, direction: Tensor) -> Tensor:
    """Draw +1 or -1 with equal probability for tiles of 4096 elements.

    In segment ``e // 4096``, row ``(e // 256) % 16`` and column ``e % 256`` read bit
    ``8 * (row % 4) + column % 8`` of word ``row // 4`` of block ``segment * 32 + column // 8``.
    Arguments and result as in `gaussian_tiles`.
    """
    blocks = (start // 128)[:, None] + torch.arange(32, device=uid.device)
    words = block_words(blocks, uid, seed=seed, direction=direction, domain=k.DOMAIN_NOISE)
    bits = (words[..., None] >> torch.arange(32, device=uid.device)) & 1
    # (tile, block, word, row % 4, column % 8) -> (tile, word, row % 4, block, column % 8)
    rows = bits.view(-1, 32, 4, 4, 8).permute(0, 2, 3, 1, 4).reshape(-1, k.TILE)
    return (2 * rows - 1).float()


def dither_tiles(uid: Tensor, start: Tensor, seed: Tensor) -> Tensor:
    """Draw the 16-bit rounding dither of tiles of 4096 elements.

    In segment ``e // 2048``, row ``(e // 256) % 8`` and column ``e % 256`` read the low (even row)
    or the high half of word ``row // 2`` of block ``segment * 256 + column``, in domain 1 with
    direction 0. Arguments as in `gaussian_tiles`.

    Returns:
        int64 ``(tiles, 4096)`` holding values in [0, 2^16).
    """
    blocks = (start // 8)[:, None] + torch.arange(k.TILE // 8, device=uid.device)
    zero = torch.zeros((), dtype=torch.int64, device=uid.device)
    words = block_words(blocks, uid, seed=seed, direction=zero, domain=k.DOMAIN_DITHER)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return halves.view(-1, 2, k.COLUMNS, 8).transpose(2, 3).reshape(-1, k.TILE)


TILE_DRAWS = {"gaussian": gaussian_tiles, "rademacher": rademacher_tiles}


def split_seed(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the two 32-bit words of a 64-bit seed, low word first, as int64 ``(2,)``."""
    return torch.tensor([seed & _MASK, (seed >> 32) & _MASK], device=device)


def noise(
    numel: int,
    *,
    seed: int,
    uid: int,
    direction: int,
    dist: str,
    start: int,
    device: torch.device | str,
) -> Tensor:
    """Draw elements ``start .. start + numel`` of a parameter's stream, float32 ``(numel,)``."""
    first, last = start // k.TILE, -(-(start + numel) // k.TILE)
    out = torch.empty(numel, dtype=torch.float32, device=device)
    words = split_seed(seed, device)
    for tile in range(first, last, _CHUNK_TILES):
        tiles = torch.arange(tile, min(tile + _CHUNK_TILES, last), device=device) * k.TILE
        drawn = TILE_DRAWS[dist](
            torch.full_like(tiles, uid), tiles, words, torch.tensor(direction, device=device)
        ).view(-1)
        begin = tile * k.TILE
        low, high = max(start, begin), min(start + numel, begin + drawn.numel())
        out[low - start : high - start] = drawn[low - begin : high - begin]
    return out


def param_uid(name: str) -> int:
    """Return the 32-bit stream identifier of a parameter name.

    Args:
        name: Canonical (tie-resolved) parameter name.

    Returns:
        The four bytes of BLAKE2s(name, digest size 4), read as little-endian.
    """
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def derive_seed(run_seed: int, step: int) -> int:
    """Return the 64-bit seed of one step of a run.

    Args:
        run_seed: Seed of the run, taken modulo 2^64.
        step: Step number, taken modulo 2^64.

    Returns:
        First two words of Philox4x32-10 with the run's seed as key and the step as counter, in a
        domain of its own.
    """
    counter = torch.tensor([step & _MASK, (step >> 32) & _MASK, 0, k.DOMAIN_SEED << k.DOMAIN_SHIFT])
    low, high, _, _ = philox4x32(counter, split_seed(run_seed)).tolist()
    return low | (high << 32)


def derive_seeds(run_seed: int, first: int, count: int) -> np.ndarray:
    """Return `derive_seed` of the steps ``first .. first + count - 1``, uint64 ``(count,)``."""
    steps = torch.arange(first, first + count, dtype=torch.int64)
    domain = torch.full_like(steps, k.DOMAIN_SEED << k.DOMAIN_SHIFT)
    counter = torch.stack(
        [steps & _MASK, (steps >> 32) & _MASK, torch.zeros_like(steps), domain], -1
    )
    words = philox4x32(counter, split_seed(run_seed))
    return (words[:, 0] | (words[:, 1] << 32)).numpy().view(np.uint64)
