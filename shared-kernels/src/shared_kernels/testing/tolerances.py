"""How far two implementations of an operation may differ, and why: one table.

Distances are counted in units in the last place of the result's dtype; those of long sums in
machine epsilons of the sum of the absolute values of their terms, because terms can cancel. A bound
is derived, not fitted; changing one needs a new derivation in ``reason``.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """A bound on the distance between two results.

    Attributes:
        ulps: Largest number of representable values between them.
        reason: Derivation of the bound.
    """

    ulps: int
    reason: str


class SumTolerance(NamedTuple):
    """A bound on the error of a sum, in machine epsilons of the sum of its absolute terms.

    Attributes:
        steps: The bound, from the numbers of terms that are added up in each stage.
        reason: Derivation of the bound.
        truncated: From the same numbers, of how many of the terms tensor cores make the sum: what
            is added to the bound where they do.
    """

    steps: Callable[..., float]
    reason: str
    truncated: Callable[..., int] = lambda *counts: 0


EXACT = Tolerance(0, "the same IEEE operations in the same order")

#: Keyed by what is computed and what it is compared with.
TOLERANCES: Final[dict[str, Tolerance]] = {
    "random.words": EXACT,
    "random.rademacher": EXACT,
    "random.gaussian": EXACT,
    "random.gaussian/interpreter": Tolerance(
        2,
        "an interpreter that rounds the product of an fma adds half an ulp to the last term of the"
        " logarithm, the cosine and the argument; the square root halves the first",
    ),
    "random.minus_two_log/float64": Tolerance(
        2, "last fma 1/2 ulp + tail 1/2 ulp of at most the result + polynomial 0.1 ulp, rounded up"
    ),
    "random.sincos/float64": Tolerance(
        2, "last operation 1/2 ulp + polynomial at most 1 ulp + coefficient rounding 1/4 ulp"
    ),
    "dp_noise.16bit/interpreter": Tolerance(
        1, "the interpreter truncates float32 to 16 bits where the GPU rounds to nearest even"
    ),
    "zo_materialize": EXACT,
    "zo_materialize.float32/interpreter": Tolerance(
        1, "a gaussian 2 ulp off, scaled by eps below 2^-6 of the sum, moves its rounding by one"
    ),
    "zo_materialize.16bit/interpreter": Tolerance(
        1, "the interpreter truncates float32 to bfloat16 where the GPU rounds to nearest even"
    ),
}

_WALK = (
    "rounding errors of a sum of k terms walk at random, sqrt(k)/3 half-epsilons of the absolute"
    " sum as standard deviation, so that sqrt(k) epsilons are six of them"
)
#: Tensor cores cut sums off where others round: of 16 products and the running sum, which is half
#: the last one on average where all terms have one sign, at most 16 quarter epsilons and one.
_TRUNCATION: Final = 5 / 32

SUM_TOLERANCES: Final[dict[str, SumTolerance]] = {
    "dp.gram": SumTolerance(
        lambda d, p, t: d**0.5 + p**0.5 + t**0.5,
        f"inner products of d and of p terms, then t rows in each direction by tiles: {_WALK}",
        truncated=lambda d, p, t: d + p,
    ),
    "dp.mm_norm": SumTolerance(
        lambda d, p, t: 2 * t**0.5 + d**0.5 + p**0.5,
        "an entry m of the product, t terms, is squared, which doubles its error and makes its"
        f" absolute terms |m| sum |g||a|; then p x d squares: {_WALK}",
        truncated=lambda d, p, t: 2 * t,
    ),
    "dp.scaled_mm": SumTolerance(
        lambda n: n**0.5 + 2,
        f"n rows; widening is exact, the scale and adding to the output round once each: {_WALK}",
        truncated=lambda n: n,
    ),
    "dp.sums": SumTolerance(
        lambda t: t**0.5 + 2, f"t rows; a product or scale and the output round once each: {_WALK}"
    ),
    "ghost.dot": SumTolerance(
        lambda i, o, t: i**0.5 + o**0.5 + t**0.5 + 1,
        f"products with i terms, times a gradient, over o outputs and t tokens: {_WALK}",
        truncated=lambda i, o, t: i,
    ),
    "ghost.low_rank": SumTolerance(
        lambda i, o, r, t: i**0.5 + o**0.5 + r**0.5 + t**0.5 + 1,
        f"two sides of i and of o terms, their product over r columns and t tokens: {_WALK}",
        truncated=lambda i, o, r, t: i + o,
    ),
    "ghost.gram": SumTolerance(
        lambda i, o, t1, t2: i**0.5 + o**0.5 + t1**0.5 + t2**0.5 + 1,
        f"inner products of i and of o terms, then t1 x t2 tokens by tiles: {_WALK}",
        truncated=lambda i, o, t1, t2: i + o,
    ),
    "ghost.product": SumTolerance(
        lambda i, o, t1, t2: t1**0.5 + t2**0.5 + (i * o) ** 0.5 + 1,
        f"entries of t1 and of t2 terms, then o x i of their products: {_WALK}",
        truncated=lambda i, o, t1, t2: t1 + t2,
    ),
    "ghost.cov": SumTolerance(
        lambda n: n**0.5 + 4,
        "n tokens; adding to the output and a weight round once each, and three TF32 products"
        f" drop 2 epsilons of a weighted term: {_WALK}",
        truncated=lambda n: n,
    ),
    "ghost.sketch": SumTolerance(
        lambda i, o, t: i**0.5 + o**0.5 + t**0.5 + 2,
        "sides of i and of o terms, whose signs are exact; t products; the scale is rounded and"
        f" rounds: {_WALK}",
        truncated=lambda i, o, t: i + o,
    ),
}


def assert_sum_within(
    actual: Tensor, expected: Tensor, terms: Tensor, tolerance: SumTolerance, *counts: int,
    operands: Tensor | None = None,
) -> None:  # fmt: skip
    """Assert that sums are within their bound of the float64 ones everywhere.

    Args:
        actual: The sums, float32 or float64, all finite.
        expected: float64, the same shape.
        terms: float64, the sums of the absolute values of the terms.
        tolerance: The bound.
        *counts: Arguments of ``tolerance.steps``.
        operands: What was multiplied. Tensor cores did it where this is on a GPU and of 16 bits.

    Raises:
        AssertionError: Different shape or a larger error; the worst element is named.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if not actual.numel():
        return
    error = (actual.double().cpu() - expected.cpu()).abs().flatten()
    steps = tolerance.steps(*counts)
    if operands is not None and operands.is_cuda and operands.element_size() == 2:
        steps += _TRUNCATION * tolerance.truncated(*counts)
    bound = steps * torch.finfo(actual.dtype).eps * terms.cpu().flatten()
    excess = torch.where(error <= bound, 0.0, (error - bound).nan_to_num(nan=float("inf")))
    worst = int(excess.argmax())
    assert bool((error <= bound).all()), (
        f"{int((~(error <= bound)).sum())} of {error.numel()} sums are out of bounds; worst is "
        f"element {worst}: error {error[worst].item():.3e}, bound {bound[worst].item():.3e}"
    )


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Count the representable values between two tensors of the same 16- or 32-bit float dtype.

    Args:
        a: float32, bfloat16 or float16 ``(...)``.
        b: Same dtype and shape as ``a``.

    Returns:
        int64 ``(...)``; 0 where both are NaN, a huge number where one is.
    """
    integer = torch.int32 if a.element_size() == 4 else torch.int16
    ordered = []
    for tensor in (a, b):
        bits = tensor.contiguous().view(integer).long()
        # negative floats count downwards from zero
        ordered.append(torch.where(bits < 0, torch.iinfo(integer).min - bits, bits))
    distance = (ordered[0] - ordered[1]).abs()
    distance = torch.where(a.isnan() | b.isnan(), 1 << 40, distance)
    return torch.where(a.isnan() & b.isnan(), 0, distance)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Assert that two tensors differ by at most the bound everywhere.

    Raises:
        AssertionError: Different dtype or shape, or a larger distance; the worst element is named.
    """
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if not actual.numel():
        return
    distance = ulp_distance(actual, expected.to(actual.device)).flatten()
    worst = int(distance.argmax())
    got, wanted = (t.flatten()[worst].item() for t in (actual, expected))
    assert int(distance[worst]) <= tolerance.ulps, (
        f"{int((distance > tolerance.ulps).sum())} of {distance.numel()} elements differ by more "
        f"than {tolerance.ulps} ulp; worst is element {worst}: got {got!r}, expected {wanted!r} "
        f"({int(distance[worst])} ulp)"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert that two tensors hold the same values bit for bit (any NaN equals any NaN).

    Raises:
        AssertionError: They do not.
    """
    expected = expected.to(actual.device)
    if actual.dtype == torch.float64:
        # the distance of two of these can be more than an integer holds
        equal = (actual == expected) & (actual.signbit() == expected.signbit())
        assert bool((equal | (actual.isnan() & expected.isnan())).all()), "numbers differ"
    elif actual.is_floating_point():
        # ulp distance takes -0 and +0 for one value; the sign bit must agree as well
        assert_within(actual, expected, EXACT)
        numbers = ~actual.isnan()
        signs = actual.signbit() != expected.signbit()
        assert not bool((signs & numbers).any()), "zeros differ in sign"
    else:
        assert torch.equal(actual, expected), "integers differ"
