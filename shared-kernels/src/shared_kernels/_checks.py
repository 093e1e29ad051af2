"""Argument checks with one message format: expected, got, what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Return dtype, shape and device of a tensor, or the type and value of anything else."""
    if isinstance(value, Tensor):
        layout = "" if value.is_contiguous() else f", strides {tuple(value.stride())}"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {tuple(value.shape)} on {value.device}{layout}"
    return f"{type(value).__name__} {value!r}"


def message(name: str, expected: str, got: object, remedy: str) -> str:
    """Return the text of an error about the argument ``name``."""
    return f"{name}: expected {expected}, got {describe(got)}; {remedy}"


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device | None = None,
    strided: bool = False,
) -> None:
    """Check dtype, shape, device and contiguity of a tensor argument.

    Args:
        name: Name of the argument.
        tensor: The argument.
        dtypes: Accepted dtypes.
        shape: Required shape; ``None`` accepts any size in that dimension.
        device: Required device, if any.
        strided: Accept a tensor that is not contiguous.

    Raises:
        TypeError: Not a tensor, or of another dtype.
        ValueError: Other shape or device, not contiguous, or part of an autograd graph.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if not isinstance(tensor, Tensor):
            raise TypeError(message(name, f"a {names} tensor", tensor, "pass a torch.Tensor"))
        raise TypeError(message(name, names, tensor, f"convert it with {name}.to(...)"))
    sizes_match = len(shape) == tensor.dim() and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not sizes_match:
        wanted = str(tuple("any" if size is None else int(size) for size in shape)).replace("'", "")
        raise ValueError(message(name, f"shape {wanted}", tensor, "reshape it or pad it"))
    if device is not None and tensor.device != device:
        raise ValueError(message(name, f"device {device}", tensor, f"move it with .to('{device}')"))
    if not strided and not tensor.is_contiguous():
        raise ValueError(message(name, "a contiguous tensor", tensor, "call .contiguous()"))
    if tensor.requires_grad:
        raise ValueError(
            message(name, "a tensor outside autograd", tensor, "pass it with .detach()")
        )


def check_range(name: str, value: int, low: int, high: int, remedy: str) -> None:
    """Check that an integer argument lies in ``[low, high)``.

    Raises:
        TypeError: Not an integer.
        ValueError: Out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(message(name, "an integer", value, remedy))
    if not low <= value < high:
        raise ValueError(message(name, f"an integer in [{low}, {high})", value, remedy))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a string argument is one of ``choices``.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        raise ValueError(message(name, "one of " + ", ".join(choices), value, "pick one of these"))
