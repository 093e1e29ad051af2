"""The checklist must fail for ops that deserve it, and the tolerances must bite."""

import itertools

import pytest
import torch
from shared_kernels.testing import (
    EXACT,
    TOLERANCES,
    Tolerance,
    assert_same_bits,
    assert_within,
    check_op,
    checks,
    poisoned_empty,
    ulp_distance,
)

counter = itertools.count()


def declare(schema, run, fake=lambda *args: None):
    name = f"shared_kernels_checks::op{next(counter)}"
    torch.library.define(name, schema)
    torch.library.impl(name, "cpu", run)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.shared_kernels_checks, name.split("::")[1]).default


def args(n):
    return (torch.arange(float(n)) + 1,)


MUTATES = "(Tensor(a!) x) -> ()"


def doubles_in_place(x):
    x.mul_(2)


def test_a_good_op_passes():
    check_op(declare(MUTATES, doubles_in_place), args, sizes=[5])


def test_undeclared_write():
    with pytest.raises(Exception, match="mutat"):
        check_op(declare("(Tensor x) -> ()", doubles_in_place), args, sizes=[5])


def test_wrong_fake():
    op = declare("(Tensor x) -> Tensor", lambda x: x * 2, lambda x: x.new_empty(x.shape[0] + 1))
    with pytest.raises(Exception, match=r"(?i)fake|meta|size"):
        check_op(op, args, sizes=[5])


def test_not_deterministic():
    def drifts(x):
        x.add_(next(counter))

    op = declare(MUTATES, drifts)
    with pytest.raises(AssertionError, match="second call: result 0 differs"):
        checks.check_deterministic(op, lambda: args(5))


def test_reads_unwritten_memory():
    def uses_scratch(x):
        # zero for every finite leftover, so that only poison can show it
        x.add_(torch.empty(x.shape[0]).mul_(0).nan_to_num_(nan=1.0))

    op = declare(MUTATES, uses_scratch)
    with pytest.raises(AssertionError, match="with poisoned memory"):
        checks.check_reads_nothing_unwritten(op, lambda: args(5))
    # an earlier check may have left its poison in the memory that is used again
    original = torch.empty

    def leftover(*shape):
        return original(*shape).fill_(float("nan"))

    torch.empty = leftover
    try:
        with pytest.raises(AssertionError, match="with poisoned memory"):
            checks.check_reads_nothing_unwritten(op, lambda: args(5))
    finally:
        torch.empty = original


def test_writes_beside_its_argument():
    def overrun(x):
        if x.storage_offset():
            torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel()).fill_(1)

    with pytest.raises(AssertionError, match="wrote beside argument 0"):
        checks.check_stays_inside(declare(MUTATES, overrun), lambda: args(5))


def test_reads_beside_its_argument():
    def overread(x):
        last = x.storage_offset() + x.numel()
        if x.untyped_storage().nbytes() > 4 * last:
            x.add_(torch.as_strided(x, (1,), (1,), last))

    with pytest.raises(AssertionError, match="between canaries"):
        checks.check_stays_inside(declare(MUTATES, overread), lambda: args(5))


def test_breaks_the_graph():
    class NotAnOp:
        """Looks like an op, but stops the tracer."""

        _schema = torch.ops.aten.relu.default._schema

        def __call__(self, x):
            torch._dynamo.graph_break()
            return x

    with pytest.raises(Exception, match=r"(?i)graph.break"):
        checks.check_compiled(NotAnOp(), lambda: args(5))


def test_poison():
    with poisoned_empty():
        assert bool(torch.empty(3).isnan().all())
        assert bool(torch.ones(3).new_empty(2).isnan().all())
        assert bool(torch.empty_like(torch.ones(2)).isnan().all())
        assert torch.empty(2, dtype=torch.int8).tolist() == [127, 127]
        assert torch.empty(1, dtype=torch.bool).tolist() == [True]
        assert torch.empty(2, device="meta").is_meta
    assert torch.empty.__name__ == "empty"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulp_distance(dtype):
    one = torch.ones(1, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert ulp_distance(one, one + eps).item() == 1
    assert ulp_distance(one, one - eps).item() == 2
    assert ulp_distance(one * 0, -one * 0).item() == 0
    tiny = torch.tensor([1], dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(
        dtype
    )
    assert ulp_distance(tiny, -tiny).item() == 2
    nan = torch.full((1,), float("nan"), dtype=dtype)
    assert ulp_distance(nan, -nan).item() == 0
    assert ulp_distance(nan, one).item() > 1 << 30


def test_assertions_name_the_worst_element():
    expected = torch.tensor([1.0, 2.0, 4.0])
    actual = torch.tensor([1.0, 2.0 + 2.0**-22, 4.0 + 2.0**-19])
    with pytest.raises(AssertionError, match=r"2 of 3 elements .* element 2: got .* \(4 ulp\)"):
        assert_within(actual, expected, EXACT)
    assert_within(actual, expected, Tolerance(4, "test"))
    with pytest.raises(AssertionError, match="zeros differ in sign"):
        assert_same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))
    with pytest.raises(AssertionError, match=r"dtype torch.float64"):
        assert_within(actual.double(), expected, EXACT)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(actual[:1], expected, EXACT)


def test_every_tolerance_has_a_reason():
    assert all(len(t.reason) > 20 and t.ulps >= 0 for t in TOLERANCES.values())
