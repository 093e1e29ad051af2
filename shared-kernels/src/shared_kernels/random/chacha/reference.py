"""ChaCha20 and secure normals in plain torch: the definition.

The numba and Triton implementations must reproduce these functions bit for bit. Words are uint32
values held in int64 tensors. Normals are *defined* in float64: every operation below is one IEEE
operation, none is contracted, and no library function but the square root is called.
"""

import numpy as np
import torch
from torch import Tensor

from shared_kernels.random.chacha import constants as k

_MASK = 0xFFFFFFFF
#: Segments drawn at a time; bounds the temporaries to a few hundred MiB.
_CHUNK_SEGMENTS = 128


def _rotl(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def quarter_round(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Apply the quarter round of RFC 8439, section 2.1, to int64 tensors of uint32 values."""
    a = (a + b) & _MASK
    d = _rotl(d ^ a, 16)
    c = (c + d) & _MASK
    b = _rotl(b ^ c, 12)
    a = (a + b) & _MASK
    d = _rotl(d ^ a, 8)
    c = (c + d) & _MASK
    b = _rotl(b ^ c, 7)
    return a, b, c, d


def chacha20_block(key: list[int], counter: Tensor, nonce: tuple[Tensor | int, ...]) -> Tensor:
    """Compute blocks of ChaCha20.

    Source: RFC 8439, section 2.3 (20 rounds, 32-bit counter, 96-bit nonce).

    Args:
        key: Eight uint32 words.
        counter: int64 ``(...)`` holding uint32 values.
        nonce: Three uint32 words, each a number or an int64 tensor broadcastable to ``counter``.

    Returns:
        int64 ``(..., 16)`` holding uint32 values: the words whose little-endian bytes are the
        key stream.
    """
    full = lambda word: torch.zeros_like(counter) + word  # noqa: E731
    start = [full(word) for word in (*k.SIGMA, *key)] + [counter] + [full(word) for word in nonce]
    x = list(start)
    for _ in range(k.DOUBLE_ROUNDS):
        for i in range(4):
            x[i::4] = quarter_round(*x[i::4])
        for i in range(4):
            diagonal = [4 * row + (i + row) % 4 for row in range(4)]
            for at, word in zip(diagonal, quarter_round(*(x[at] for at in diagonal)), strict=True):
                x[at] = word
    return torch.stack([(a + b) & _MASK for a, b in zip(x, start, strict=True)], dim=-1)


def stream_nonce(step: int, uid: int, domain: int, block: int) -> tuple[int, int, int]:
    """Return the nonce of a block of a noise stream; its counter is the low 32 bits of ``block``.

    Injective: no two (step, uid, domain, block) within their ranges share nonce and counter.

    Args:
        step: Step number in [0, 2^40).
        uid: Parameter identifier in [0, 2^32).
        domain: What the noise is for, in [0, 2^8).
        block: Block index in [0, 2^48).

    Returns:
        Three uint32 words.
    """
    middle = (step >> 32) | ((block >> 32) << k.BLOCK_SHIFT) | (domain << k.DOMAIN_SHIFT)
    return step & _MASK, middle, uid


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def minus_two_log(u: Tensor) -> Tensor:
    """Compute ``-2 ln u`` for float64 ``u`` in (0, 1], relative error below 2^-49."""
    shifted = u.view(torch.int64) - k.SQRT_HALF_BITS
    exponent = (shifted >> 52).double()
    mantissa = ((shifted & ((1 << 52) - 1)) + k.SQRT_HALF_BITS).view(torch.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * k.MINUS_TWO_LN2 + s * _horner(s * s, k.LOG_L)


def _sqrt(x: Tensor) -> Tensor:
    # torch.sqrt of float64 is not correctly rounded on every CPU, NumPy's is
    return x.sqrt() if x.is_cuda else torch.from_numpy(np.sqrt(x.numpy()))


def box_muller(
    radius_high: Tensor, radius_low: Tensor, angle_high: Tensor, angle_low: Tensor
) -> tuple[Tensor, Tensor]:
    """Map two uniform 64-bit words, given as halves, to two independent standard normals.

    ``u = (w_a + 1/2) / 2^64`` gives ``radius = sqrt(-2 ln u)``. The low 62 bits of ``w_b`` are a
    signed angle ``pi/2 r``, ``r`` in [-1/2, 1/2], around the positive x axis; bit 63 flips the sign
    of the cosine and then bit 62 exchanges the two coordinates, which together reach the other
    three quadrants.

    Args:
        radius_high: int64 ``(...)`` holding uint32 values; so are the other three.
        radius_low: See ``radius_high``.
        angle_high: See ``radius_high``.
        angle_low: See ``radius_high``.

    Returns:
        Two float64 ``(...)`` tensors.
    """
    u = radius_high.double() * k.TWO_M32 + (radius_low.double() + 0.5) * k.TWO_M64
    radius = _sqrt(minus_two_log(u))
    # the top two bits fall off: the next 30 are read as a signed number, scaled by 4
    signed = ((angle_high << 2) & _MASK).to(torch.int32)
    r = signed.double() * k.TWO_M32 + (angle_low.double() + 0.5) * k.TWO_M62
    t = r * k.HALF_PI
    t2 = t * t
    sine = t * _horner(t2, k.SIN_S)
    cosine = _horner(t2, k.COS_C)
    cosine = torch.where((angle_high >> 31) & 1 == 1, -cosine, cosine)
    swap = (angle_high >> 30) & 1 == 1
    first = torch.where(swap, sine, cosine)
    second = torch.where(swap, cosine, sine)
    return radius * first, radius * second


def standard_normals(
    numel: int,
    *,
    key: list[int],
    step: int,
    uid: int,
    domain: int,
    start: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw elements ``start .. start + numel`` of a secure stream of standard normals.

    Element ``e`` lies in segment ``e // 2048``, lane ``(e // 256) % 8`` and column ``e % 256``;
    words ``4 p .. 4 p + 3`` of block ``segment * 256 + column`` yield lanes ``2 p`` and
    ``2 p + 1``.

    Args:
        numel: Number of elements.
        key: Eight uint32 words.
        step: See `stream_nonce`, as are ``uid`` and ``domain``.
        uid: See ``step``.
        domain: See ``step``.
        start: Index of the first element; ``start + numel`` is at most 2^51.
        device: Where to draw.

    Returns:
        float64 ``(numel,)``.
    """
    out = torch.empty(numel, dtype=torch.float64, device=device)
    first, last = start // k.SEGMENT, -(-(start + numel) // k.SEGMENT)
    column = torch.arange(k.COLUMNS, device=device)
    for low in range(first, last, _CHUNK_SEGMENTS):
        segments = torch.arange(low, min(low + _CHUNK_SEGMENTS, last), device=device)[:, None]
        # a segment begins at a multiple of its number of blocks: its high word is constant
        blocks = segments * k.COLUMNS + column
        n0, n1, n2 = stream_nonce(step, uid, domain, 0)
        n1 = n1 | ((blocks >> 32) << k.BLOCK_SHIFT)
        words = chacha20_block(key, blocks & _MASK, (n0, n1, n2)).unbind(-1)
        lanes = [z for p in range(0, k.WORDS, 4) for z in box_muller(*words[p : p + 4])]
        drawn = torch.stack(lanes, dim=1).reshape(-1)
        begin = low * k.SEGMENT
        a, b = max(start, begin), min(start + numel, begin + drawn.numel())
        out[a - start : b - start] = drawn[a - begin : b - begin]
    return out
