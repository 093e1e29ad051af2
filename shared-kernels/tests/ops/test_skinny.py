"""Few rows times several matrices: against float64, row by row, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.skinny import MOST_ROWS, op, skinny_linears
from shared_kernels.testing import check_op


def make(rows, inner, sizes, dtype=torch.float32, device="cpu", bias=True):
    generator = torch.Generator().manual_seed(rows + inner)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    weights = [draw(n, inner) for n in sizes]
    return draw(rows, inner), weights, [draw(n) for n in sizes] if bias else None


def check(x, weights, biases, impl):
    found = skinny_linears(x, weights, biases, impl=impl)
    epsilon = torch.finfo(x.dtype).eps
    for number, (part, weight) in enumerate(zip(found, weights, strict=True)):
        exact = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        if biases is not None:
            exact = exact + biases[number].double()
        # sums of float32 walk at random, and 16 bits round once
        bound = x.shape[1] ** 0.5 * 1.2e-7 * size + epsilon * exact.abs() + 1e-30
        assert part.dtype == x.dtype
        assert bool(((part.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("sizes", [(70,), (64, 1), (5, 130, 64), (1, 2, 3, 65)])
def test_each_product_is_right(impl, sizes, kernel_device):
    device = kernel_device if impl == "triton" else "cpu"
    for rows, inner, bias in ((1, 7, True), (16, 130, False), (MOST_ROWS, 256, True)):
        check(*make(rows, inner, sizes, device=device, bias=bias), impl)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 20), inner=st.integers(1, 70), sizes=st.lists(st.integers(0, 70),
       min_size=1, max_size=4))  # fmt: skip
def test_any_shape(rows, inner, sizes):
    check(*make(rows, inner, sizes), "auto")


def test_a_row_does_not_depend_on_the_others(kernel_device):
    x, weights, biases = make(40, 96, (70, 33), device=kernel_device)
    whole = skinny_linears(x, weights, biases, impl="triton")
    other = x.clone()
    other[:17] = 9.0
    for a, b in zip(whole, skinny_linears(other, weights, biases, impl="triton"), strict=True):
        assert torch.equal(a[17:], b[17:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(cuda, dtype):
    for rows in (1, 8, 33, 64):
        for sizes in ((2048, 1024, 1024), (6144, 6144), (100, 7)):
            x, weights, biases = make(rows, 2048, sizes, dtype, cuda, bias=rows != 8)
            check(x, weights, biases, "triton")
            # a place in the batch changes no bit
            turned = skinny_linears(x.roll(1, 0), weights, biases, impl="triton")
            for a, b in zip(skinny_linears(x, weights, biases), turned, strict=True):
                assert torch.equal(a, b.roll(-1, 0))


def test_the_op_keeps_the_rules_of_the_house():
    def arguments(rows):
        x, weights, biases = make(rows, 33, (5, 70))
        return x, weights, biases, "auto"

    check_op(op.skinny_linears, arguments, [3, 1])


def test_bad_input():
    x, weights, biases = make(2, 5, (3, 4))
    with pytest.raises(ValueError, match=r"weights: .*at least one matrix"):
        skinny_linears(x, [])
    with pytest.raises(ValueError, match="a bias for each"):
        skinny_linears(x, weights, biases[:1])
    with pytest.raises(ValueError, match=r"weights: expected shape \(any, 5\)"):
        skinny_linears(x, [weights[0][:, :4].contiguous()])
    with pytest.raises(TypeError, match="weights"):
        skinny_linears(x, [weights[0].double()])
