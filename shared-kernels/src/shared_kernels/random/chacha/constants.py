"""Numbers that define the secure stream: one copy for the torch, numba and Triton code.

The polynomials are Taylor series, cut where the next term is below 2^-49 of the sum, with the
coefficients rounded to float64.
"""

import math
from typing import Final

# RFC 8439, section 2.3: "expand 32-byte k" as little-endian words, and ten double rounds
SIGMA: Final = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
DOUBLE_ROUNDS: Final = 10
WORDS: Final = 16

# A segment is the unit of work of every implementation: 256 blocks of eight normals each.
COLUMNS: Final = 256
LANES: Final = 8
SEGMENT: Final = LANES * COLUMNS

# The second nonce word holds what is left of the step, of the block index, and the domain.
STEP_BITS: Final = 40
BLOCK_BITS: Final = 48
DOMAIN_BITS: Final = 8
BLOCK_SHIFT: Final = STEP_BITS - 32
DOMAIN_SHIFT: Final = BLOCK_SHIFT + BLOCK_BITS - 32
MAX_ELEMENTS: Final = LANES << BLOCK_BITS

TWO_M32: Final = 2.0**-32
TWO_M62: Final = 2.0**-62
TWO_M64: Final = 2.0**-64
# bits of sqrt(1/2): subtracting them before the shift puts the mantissa in [sqrt(1/2), sqrt(2))
SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD
MINUS_TWO_LN2: Final = -2.0 * math.log(2.0)
HALF_PI: Final = math.pi / 2
# -2 ln m = s (L0 + L1 s^2 + ...) with s = (m - 1) / (m + 1), |s| <= 0.1716
LOG_L: Final = tuple(-4.0 / (2 * k + 1) for k in range(9))
# sin t = t (S0 + S1 t^2 + ...) and cos t = C0 + C1 t^2 + ..., |t| <= pi/4
SIN_S: Final = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))
COS_C: Final = tuple((-1) ** k / math.factorial(2 * k) for k in range(9))
