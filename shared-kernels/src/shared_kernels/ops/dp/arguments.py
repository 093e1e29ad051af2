"""Argument checks that the segment operations share. Shapes only: values stay on the device."""

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, check_tensor, message
from shared_kernels.ops.dp.reference import accumulate_dtype

CLIPPINGS = ("abadi", "automatic")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_rows(name: str, rows: Tensor) -> None:
    """Check a floating-point matrix with any strides."""
    check_tensor(name, rows, dtypes=_FLOATS, shape=(None, None), strided=True)


def check_pair(a: Tensor, g: Tensor, *, names: tuple[str, str] = ("a", "g")) -> None:
    """Check two matrices of one dtype, with as many rows each."""
    check_rows(names[0], a)
    check_tensor(
        names[1], g, dtypes=(a.dtype,), shape=(a.shape[0], None), device=a.device, strided=True
    )


def check_units(cu_seqlens: Tensor, like: Tensor) -> None:
    """Check the dtype, the device and the size of the boundaries."""
    check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32,), shape=(None,), device=like.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(
            message("cu_seqlens", "at least the boundary 0", cu_seqlens, "pass [0] for no units")
        )


def check_tokens(tokens: Tensor, g: Tensor) -> None:
    """Check tokens beside the rows that belong to them."""
    check_rows("g", g)
    check_tensor(
        "tokens",
        tokens,
        dtypes=(torch.int64, torch.int32),
        shape=(g.shape[0],),
        device=g.device,
        strided=True,
    )


def check_scale(scale: Tensor, cu_seqlens: Tensor, g: Tensor) -> None:
    """Check the factors of the units."""
    check_tensor(
        "scale",
        scale,
        dtypes=(accumulate_dtype(g.dtype),),
        shape=(cu_seqlens.shape[0] - 1,),
        device=g.device,
    )


def check_out(name: str, out: Tensor, shape: tuple[int | None, ...], g: Tensor) -> None:
    """Check a tensor that is added to, with any strides but no element twice."""
    dtype = accumulate_dtype(g.dtype)
    check_tensor(name, out, dtypes=(dtype,), shape=shape, device=g.device, strided=True)
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(message(name, "no expanded dimension", out, "pass its own memory"))


def check_length(max_seqlen: int | None) -> None:
    """Check the hint about the longest unit."""
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(
            message("max_seqlen", "a length or None", max_seqlen, "pass the longest unit's rows")
        )


def as_threshold(
    threshold: float | Tensor, clipping: str, stability: float, like: Tensor
) -> Tensor:
    """Return the threshold as a scalar beside ``like``, in its accumulation dtype, checked."""
    check_choice("clipping", clipping, CLIPPINGS)
    if not stability > 0:
        raise ValueError(message("stability", "a positive number", stability, "use 0.01"))
    dtype = accumulate_dtype(like.dtype)
    if isinstance(threshold, Tensor):
        check_tensor("threshold", threshold, dtypes=(dtype,), shape=(), device=like.device)
        return threshold
    if not threshold > 0:
        raise ValueError(message("threshold", "a positive number", threshold, "use for example 1"))
    if clipping == "automatic" and threshold == float("inf"):
        raise ValueError(
            message("threshold", "a finite number with automatic clipping", threshold, "use abadi")
        )
    return torch.full((), threshold, dtype=dtype, device=like.device)


def check_equal(equal: bool, g: Tensor, cu_seqlens: Tensor) -> None:
    """Check that units of equal length can make up the rows."""
    units = cu_seqlens.shape[0] - 1
    if equal and (g.shape[0] % units if units else g.shape[0]):
        raise ValueError(message("equal", f"rows divisible by {units} units", g, "pass False"))


def check_multiple(row_multiple: int, cu_seqlens: Tensor) -> None:
    """Check the promise about boundaries: its sign, and on the CPU its truth."""
    if row_multiple < 1:
        raise ValueError(message("row_multiple", "at least 1", row_multiple, "leave it out"))
    if row_multiple > 1 and cu_seqlens.device.type == "cpu" and (cu_seqlens % row_multiple).any():
        raise ValueError(
            message("cu_seqlens", f"multiples of {row_multiple}", cu_seqlens, "promise less")
        )
