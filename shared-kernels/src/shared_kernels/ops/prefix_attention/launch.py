"""Launches of the attention kernels."""

import functools
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels._autotune import choose
from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.prefix_attention.layout import PrefixLayout, Tables

#: (token, head of a group) pairs of a tile.
_PAIRS: Final = 128
_MAX_DIM: Final = 256
_LOG2E: Final = 1.4426950408889634


def configs(size: int, element_size: int) -> tuple[dict[str, int], ...]:
    """Return launch options for heads of up to ``size`` dimensions, the default first.

    With at most 128 registers a thread, two programs of 256 threads share a multiprocessor, and
    one computes while the other waits for its queries.
    """
    if element_size == 4:
        return tuple({"num_warps": warps, "num_stages": 1} for warps in (8, 4))
    two = {"num_warps": 8, "num_stages": 2}
    if size > 128:
        return two, {"num_warps": 8, "num_stages": 3}
    return {**two, "maxnreg": 128}, {"num_warps": 8, "num_stages": 3}


def block_keys(dim: int, element_size: int) -> int:
    """Return how many keys a step takes.

    It sets the order of the sums, so it depends on nothing that tuning or other rows change.
    """
    if element_size == 4:
        return 32 if dim <= 128 else 16
    return 64 if dim <= 128 else 32


def tiling(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Return how many queries a tile holds, and how many keys a block."""
    size = _power_of_two(max(q.shape[2], v.shape[2]))
    return max(1, _PAIRS // (q.shape[1] // k.shape[1])), block_keys(size, q.element_size())


def tables(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor) -> Tables:
    """Return the kernel's tables, or empty ones where no kernel can run."""
    if not q.is_cuda and not interpreting():
        return Tables(*(q.new_empty(0, dtype=torch.int32) for _ in Tables._fields))
    return layout.tables(q.device, *tiling(q, k, v))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unsupported(q: Tensor, *args: Any) -> str | None:
    """Say why no kernel can take these arguments, or None."""
    tensors = (q, *(arg for arg in args if isinstance(arg, Tensor)))
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64 has no kernel"
    if args and max(q.shape[-1], args[1].shape[-1]) > _MAX_DIM:
        return f"heads have more than {_MAX_DIM} dimensions"
    if args and q.shape[1] // args[0].shape[1] > _PAIRS:
        return f"more than {_PAIRS} query heads share a key head"
    if q.is_cuda and _capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {_capability(q.device)}"
    return None


def _kernels(*tensors: Any) -> Any:
    """Import the kernels; launch options are not part of their signatures, hence Any."""
    reason = unsupported(*tensors)
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.prefix_attention import triton

    return triton


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _describe(keys: Tensor, block: int) -> Any:
    """Describe (M, heads, D) to the copy engine in blocks of one head, or return None."""
    size = keys.element_size()
    aligned = all(stride * size % 16 == 0 for stride in keys.stride()[:2])
    if not keys.numel() or not aligned or keys.data_ptr() % 16:
        return None
    if keys.is_cuda and _capability(keys.device) < (9, 0):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [block, 1, _power_of_two(keys.shape[2])]
    return TensorDescriptor(keys, list(keys.shape), list(keys.stride()), shape)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    lanes: Tensor,
    tiles: Tensor,
    blocks: Tensor,
    rows: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.prefix_attention` defines."""
    kernel = _kernels(q, k, v, shared_k, shared_v).prefix_attention_kernel
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if not out.numel():
        return out, lse.fill_(float("-inf"))
    dim, value_dim, heads = q.shape[2], v.shape[2], k.shape[1]
    size = _power_of_two(max(dim, value_dim))

    block = block_keys(size, q.element_size())

    def launch(config: Mapping[str, int]) -> None:
        kernel[(tiles.shape[0], heads)](
            q,
            k,
            v,
            shared_k,
            shared_v,
            *(_describe(x, block) for x in (shared_k, shared_v)),
            sinks,
            out,
            lse,
            lanes,
            tiles,
            blocks,
            *(stride for x in (q, k, v, shared_k, shared_v) for stride in x.stride()[:2]),
            scale * _LOG2E if softcap is None else scale / softcap,
            0.0 if softcap is None else softcap * _LOG2E,
            window or 0,
            GROUP=q.shape[1] // heads,
            D=dim,
            DV=value_dim,
            BD=_power_of_two(dim),
            BDV=_power_of_two(value_dim),
            BM=_PAIRS,
            BN=block,
            COLUMNS=lanes.shape[1],
            WINDOW=window is not None,
            SOFTCAP=softcap is not None,
            WIDEN=interpreting(),
            **config,
        )

    with torch.cuda.device_of(q):
        kind = f"{str(q.dtype).removeprefix('torch.')}-{size}"
        launch(choose("prefix_attention", kind, configs(size, q.element_size()), launch))
    return out, lse


def merge_states(
    outs: list[Tensor], lses: list[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.merge_states` defines."""
    kernel = _kernels(outs[0]).merge_kernel
    first = outs[0]
    out, lse = torch.empty_like(first), torch.empty_like(lses[0])
    if first.numel():
        pairs, width = lse.numel(), first.shape[2]
        columns = _power_of_two(width)
        block = max(1, 4096 // columns)
        with torch.cuda.device_of(first):
            kernel[(-(-pairs // block),)](
                tuple(outs),
                tuple(lses),
                sinks,
                out,
                lse,
                pairs,
                first.shape[1],
                width,
                BLOCK=block,
                BDV=columns,
            )
    return out, lse
