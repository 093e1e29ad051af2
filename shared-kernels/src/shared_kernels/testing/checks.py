"""The checklist that every op must pass, as one function."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from shared_kernels.testing.poison import poison_, poisoned_empty

OPCHECKS: Final = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
_CANARY_ELEMENTS = 64


def written_arguments(op: Any) -> list[int]:
    """Return the positions of the arguments that an op's schema declares as written."""
    return [
        index
        for index, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _results(op: Any, returned: Any, args: Sequence[Any]) -> list[Tensor]:
    written = [args[index] for index in written_arguments(op)]
    return [_bytes(t).clone() for t in tree_leaves((returned, written)) if isinstance(t, Tensor)]


def _assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(actual) == len(expected), f"{what}: {len(actual)} results, not {len(expected)}"
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"{what}: result {index} differs"


def check_compiled(op: Any, make_args: Callable[[], Sequence[Any]]) -> None:
    """Assert that the op compiles into one graph and does there what it does eagerly."""
    args = make_args()
    expected = _results(op, op(*args), args)
    args = make_args()
    # every call compiles the same lambda, and dynamo gives up on it after a few
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    _assert_same(_results(op, compiled(*args), args), expected, "compiled")


def check_deterministic(op: Any, make_args: Callable[[], Sequence[Any]]) -> None:
    """Assert that two calls on equal arguments give the same bits."""
    runs = []
    for _ in range(2):
        args = make_args()
        runs.append(_results(op, op(*args), args))
    _assert_same(runs[1], runs[0], "second call")


def check_reads_nothing_unwritten(op: Any, make_args: Callable[[], Sequence[Any]]) -> None:
    """Assert that NaN in every ``torch.empty`` does not reach the results."""
    args = make_args()
    # zeros, not what memory happens to hold: that may be the poison of an earlier check
    with poisoned_empty(Tensor.zero_):
        returned = op(*args)
    expected = _results(op, returned, args)
    args = make_args()
    with poisoned_empty():
        returned = op(*args)
    _assert_same(_results(op, returned, args), expected, "with poisoned memory")


def check_stays_inside(op: Any, make_args: Callable[[], Sequence[Any]]) -> None:
    """Assert that nothing is read or written beside the tensors.

    Every contiguous tensor argument, in a list too, is placed in the middle of a poisoned buffer;
    the margins must stay as they were, and the results the same.
    """
    args = make_args()
    expected = _results(op, op(*args), args)
    margins = []

    def placed(index: int, argument: Any) -> Any:
        if not isinstance(argument, Tensor) or not argument.is_contiguous():
            return argument
        numel = argument.numel()
        buffer = poison_(argument.new_empty(numel + 2 * _CANARY_ELEMENTS))
        inner = buffer[_CANARY_ELEMENTS : _CANARY_ELEMENTS + numel]
        outer = (buffer[:_CANARY_ELEMENTS], buffer[_CANARY_ELEMENTS + numel :])
        margins.extend((index, margin, _bytes(margin).clone()) for margin in outer)
        return inner.copy_(argument.reshape(-1)).view(argument.shape)

    args = [
        tree_map(functools.partial(placed, index), argument)
        for index, argument in enumerate(make_args())
    ]
    _assert_same(_results(op, op(*args), args), expected, "between canaries")
    for index, margin, before in margins:
        assert torch.equal(_bytes(margin), before), f"wrote beside argument {index}"


def check_op(
    op: Any,
    make_args: Callable[[int], Sequence[Any]],
    sizes: Sequence[int],
    *,
    opchecks: Sequence[str] = OPCHECKS,
) -> None:
    """Run the whole checklist on one op.

    Args:
        op: An overload such as ``torch.ops.shared_kernels.noise_.default``.
        make_args: Makes fresh, equal positional arguments of a size at every call.
        sizes: Sizes to check, with the meaning that ``make_args`` gives them: include 0 or 1, a
            prime, and both neighbours of a block size. The first one is also compiled and given to
            `torch.library.opcheck`.
        opchecks: Which tests of `torch.library.opcheck` to run.

    Raises:
        AssertionError: A check failed; opcheck raises errors of its own.
    """
    torch.library.opcheck(op, tuple(make_args(sizes[0])), test_utils=tuple(opchecks))
    check_compiled(op, lambda: make_args(sizes[0]))
    for size in sizes:
        for check in (check_deterministic, check_reads_nothing_unwritten, check_stays_inside):
            check(op, lambda size=size: make_args(size))
