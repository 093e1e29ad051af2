"""Numbers that define the streams: one copy for the torch, numba and Triton implementations.

Every float below is exactly representable in float32. The polynomial coefficients come from a
minimax fit (iteratively reweighted least squares in extended precision, coefficients rounded to
float32 one after the other, the rest refitted after each rounding); README.md in this folder states
their errors.
"""

from typing import Final

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), Philox4x32 with ten rounds.
PHILOX_M0: Final = 0xD2511F53
PHILOX_M1: Final = 0xCD9E8D57
PHILOX_W0: Final = 0x9E3779B9
PHILOX_W1: Final = 0xBB67AE85
PHILOX_ROUNDS: Final = 10

DOMAIN_NOISE: Final = 0
DOMAIN_DITHER: Final = 1
DOMAIN_SEED: Final = 2
DOMAIN_TOKEN: Final = 3
DOMAIN_SHIFT: Final = 24
MAX_DIRECTION: Final = 1 << DOMAIN_SHIFT

# A tile is the unit of work of every implementation: a multiple of all segment sizes below.
TILE: Final = 4096
COLUMNS: Final = 256
GAUSSIAN_SEGMENT: Final = 4 * COLUMNS
RADEMACHER_SEGMENT: Final = 16 * COLUMNS
DITHER_SEGMENT: Final = 8 * COLUMNS

TWO_M31: Final = 2.0**-31
TWO_M32: Final = 2.0**-32
ONE_BELOW: Final = 1 - 2.0**-24
# bits of sqrt(1/2): subtracting them before the shift puts the mantissa in [sqrt(1/2), sqrt(2))
SQRT_HALF_BITS: Final = 0x3F3504F3
MINUS_TWO_LN2: Final = -1.3862943649291992
# -2 ln(1 + f) = -2 f + f^2 Q(f), Q of degree 8, on [sqrt(1/2) - 1, sqrt(2) - 1]
LOG_Q: Final = (
    1.0,
    -0.6666666269302368,
    0.5000163912773132,
    -0.4000248312950134,
    0.332468181848526,
    -0.28403159976005554,
    0.26319220662117004,
    -0.25524434447288513,
    0.15272878110408783,
)
# sin(pi/2 r) = r S(r^2) and cos(pi/2 r) = 1 + r^2 C(r^2), on [-1/2, 1/2]
SIN_S: Final = (
    1.5707963705062866,
    -0.645966649055481,
    0.07971252501010895,
    -0.004685971420258284,
)
COS_C: Final = (
    -1.2337005138397217,
    0.25366851687431335,
    -0.0208552535623312,
    0.0008935725782066584,
)
