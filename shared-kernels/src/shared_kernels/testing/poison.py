"""Fill uninitialised memory with values that cannot be overlooked."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_FUNCTIONS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def poison_(tensor: Tensor) -> Tensor:
    """Fill a tensor with NaN, or with the largest value of an integer dtype, and return it."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_empty(fill: Callable[[Tensor], Tensor] = poison_) -> Generator[None]:
    """Make ``torch.empty`` and its relatives return poisoned tensors in this context.

    A result that depends on memory nobody wrote then shows up as NaN.

    Args:
        fill: Fills a new tensor in place and returns it.
    """

    def poisoned(original: Any) -> Any:
        def create(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor if tensor.device.type == "meta" else fill(tensor)

        return create

    patches = [
        mock.patch.object(owner, name, poisoned(getattr(owner, name))) for owner, name in _FUNCTIONS
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
