"""Rows of privacy units, and what the operations on them must give: a float64 loop over units."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels.testing.tolerances import SUM_TOLERANCES, assert_sum_within

#: Tokens of `make_units` are below this.
TOKENS = 6


class UnitRows(NamedTuple):
    """Flat rows of units.

    Attributes:
        a: Inputs ``(N, d)``.
        g: Gradients ``(N, p)``.
        cu: Boundaries ``(U + 1,)``.
        tokens: int64 ``(N,)``.
        scale: ``(U,)``, in the accumulation dtype.
    """

    a: Tensor
    g: Tensor
    cu: Tensor
    tokens: Tensor
    scale: Tensor

    def on(self, device: str) -> "UnitRows":
        """Return the same on another device."""
        return UnitRows(*(tensor.to(device) for tensor in self))

    @property
    def dtype(self) -> torch.dtype:
        """Accumulation dtype."""
        return torch.float64 if self.a.dtype == torch.float64 else torch.float32

    @property
    def longest(self) -> int:
        """Rows of the longest unit."""
        return int(self.cu.diff().max()) if len(self.cu) > 1 else 0

    def units(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs and gradients in float64, and tokens, unit by unit."""
        bounds = self.cu.tolist()
        for low, high in pairwise(bounds):
            rows = slice(low, high)
            yield self.a[rows].double(), self.g[rows].double(), self.tokens[rows]

    def products(self) -> tuple[Tensor, Tensor]:
        """Return float64 ``G_i^T A_i``, its bias as a last column, and that of absolute values."""
        shape = (len(self.cu) - 1, self.g.shape[1], self.a.shape[1] + 1)
        both = self.a.new_zeros(2, *shape, dtype=torch.float64)
        for unit, (a, g, _) in enumerate(self.units()):
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
            both[0, unit] = g.T @ a
            both[1, unit] = g.abs().T @ a.abs()
        return both[0], both[1]

    def gram_terms(self, bias: bool) -> Tensor:
        """Return the float64 sums of absolute values that bound a Gram norm."""
        sums = [((a @ a.T + bias) * (g @ g.T)).abs().sum() for a, g, _ in self.units()]
        return torch.stack(sums) if sums else self.a.new_zeros(0, dtype=torch.float64)

    def outputs(self, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
        """Return outputs full of 0.5 for a weight and a bias.

        Args:
            layout: Of the weight's: ``contiguous``, ``transposed`` or ``gaps`` (holding NaN).
        """
        p, d = self.g.shape[1], self.a.shape[1]
        full = lambda *shape: self.a.new_full(shape, 0.5, dtype=self.dtype)  # noqa: E731
        if layout == "transposed":
            out = full(d, p).T
        elif layout == "gaps":
            out = full(2 * p, 3 * d).fill_(float("nan"))[::2, 1 : 2 * d : 2].fill_(0.5)
        else:
            out = full(p, d)
        return out, full(p)


def make_units(
    lengths: Sequence[int],
    d: int,
    p: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    strided: bool = False,
) -> UnitRows:
    """Make random rows of units.

    Args:
        lengths: Rows of each unit.
        d: Columns of the inputs.
        p: Columns of the gradients.
        dtype: Of both.
        seed: Equal arguments give equal rows.
        strided: Make matrices that are not contiguous in either direction.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)

    def randn(columns: int) -> Tensor:
        if strided:
            whole = torch.randn(columns, 2 * rows + 1, generator=generator).to(dtype)
            return whole.T[1::2]
        return torch.randn(rows, columns, generator=generator).to(dtype)

    scale = torch.rand(len(lengths), generator=generator) + 0.1
    return UnitRows(
        # a mean of the inputs makes the bias matter
        randn(d) + 0.25,
        randn(p),
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.randint(0, TOKENS, (rows,), generator=generator),
        scale.double() if dtype == torch.float64 else scale,
    )


def assert_gram_norm(units: UnitRows, n2: Tensor, absolute: Tensor, bias: bool) -> None:
    """Assert that both results of ``segment_gram_norm`` are within their bounds."""
    expected = units.products()[0][..., : None if bias else -1].square().sum((1, 2))
    terms = units.gram_terms(bias)
    sizes = (units.a.shape[1], units.g.shape[1], units.longest)
    for actual, wanted in ((n2, expected), (absolute, terms)):
        assert actual.dtype == units.dtype
        assert_sum_within(
            actual, wanted, terms, SUM_TOLERANCES["dp.gram"], *sizes, operands=units.a
        )


def assert_mm_norm(units: UnitRows, n2: Tensor, bias: bool) -> None:
    """Assert that the result of ``segment_mm_norm`` is within its bound."""
    product, terms = (m[..., : None if bias else -1] for m in units.products())
    sizes = (units.a.shape[1], units.g.shape[1], units.longest)
    expected, terms = product.square().sum((1, 2)), (product.abs() * terms).sum((1, 2))
    assert n2.dtype == units.dtype
    assert_sum_within(n2, expected, terms, SUM_TOLERANCES["dp.mm_norm"], *sizes, operands=units.a)


def assert_scaled_sum(
    units: UnitRows, scale: Tensor, out: Tensor, bias_out: Tensor | None = None
) -> None:
    """Assert that outputs of `UnitRows.outputs` have had the scaled sum added within its bound."""
    product, terms = units.products()
    scale = scale.double()
    # a unit without a scale counts nothing, whatever it holds
    product, terms = (torch.where(scale[:, None, None] != 0, m, 0.0) for m in (product, terms))
    expected = torch.einsum("u,upd->pd", scale, product) + 0.5
    terms = torch.einsum("u,upd->pd", scale.abs(), terms) + 0.5
    for column, got in ((slice(None, -1), out), (-1, bias_out)):
        if got is not None:
            assert_sum_within(
                got, expected[:, column], terms[:, column], SUM_TOLERANCES["dp.scaled_mm"],
                len(units.g), operands=units.a,
            )  # fmt: skip
