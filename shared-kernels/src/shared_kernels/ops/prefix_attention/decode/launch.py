"""Launches of the decoding kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.prefix_attention import launch as packed

#: Keys that a program walks: fixed, so that a slot's sums do not depend on how long others are. A
#: prefix of one split is cut into four, which are walked while own keys are.
OWN_SPLIT: Final = 256
PREFIX_SPLIT: Final = 512
#: (slot, head of a group) pairs of a tile over a prefix.
PAIRS: Final = 64
#: Programs of prefixes for each head and split. Most batches have no more tiles, and programs
#: without one delay the others.
WALKERS: Final = 16
#: Registers of a thread with which three programs run at once on a multiprocessor.
_REGISTERS: Final = 168
_LOG2E: Final = 1.4426950408889634


def unsupported(q: Tensor, *args: Any) -> str | None:
    """Say why the kernels cannot take these arguments, or None."""
    tensors = [arg for arg in args[:4] if isinstance(arg, Tensor)]
    return packed.unsupported(q, *tensors)


def tile_of(heads: int, key_heads: int) -> int:
    """Return how many slots share a tile."""
    return max(1, PAIRS // (heads // key_heads))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    lengths: Tensor,
    starts: Tensor,
    prefix_lengths: Tensor,
    order: Tensor,
    tiles: Tensor,
    capacity: int,
    tile: int,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.decode_attention` defines: parts of the keys, then their merge."""
    reason = unsupported(q, k, v, shared_k, shared_v)
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.prefix_attention.decode import triton as kernels

    slots, heads, dim = q.shape
    key_heads, value_dim = k.shape[1], v.shape[2]
    group = heads // key_heads
    out = q.new_empty(slots, heads, value_dim)
    lse = q.new_empty(slots, heads, dtype=torch.float32)
    if not out.numel():
        return out, lse.fill_(float("-inf"))
    prefix_splits = max(4, -(-longest // PREFIX_SPLIT)) if shared_k.shape[0] else 0
    own_splits = -(-capacity // OWN_SPLIT)
    splits = prefix_splits + own_splits
    parts = q.new_empty(slots, heads, splits, value_dim, dtype=torch.float32)
    sums = q.new_empty(slots, heads, splits, dtype=torch.float32)
    size = packed._power_of_two(max(dim, value_dim))
    numbers = (
        scale * _LOG2E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * _LOG2E,
        window or 0,
    )
    constants: dict[str, Any] = {
        "GROUP": group, "D": dim, "DV": value_dim, "BD": packed._power_of_two(dim),
        "BDV": packed._power_of_two(value_dim), "BN": packed.block_keys(size, q.element_size()),
        "WINDOW": window is not None, "SOFTCAP": softcap is not None, "WIDEN": interpreting(),
    }  # fmt: skip
    small = q.element_size() == 2
    if small and size <= 128:
        # what a tile needs must not make room scarce for those that walk own keys
        constants["BN_SHARED"], constants["maxnreg"] = 32, _REGISTERS
    else:
        constants["BN_SHARED"] = constants["BN"]
    walkers = min(slots, WALKERS)
    attend: Any = kernels.decode_parts_kernel
    merge: Any = kernels.decode_merge_kernel
    with torch.cuda.device_of(q):
        attend[(key_heads * (walkers * prefix_splits + slots * own_splits),)](
            q, k, v, shared_k, shared_v, parts, sums, lengths, starts, prefix_lengths, order,
            tiles, slots, walkers, capacity, splits, prefix_splits, own_splits, key_heads,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *shared_k.stride()[:2],
            *shared_v.stride()[:2], *numbers, OWN=OWN_SPLIT, SHARED=PREFIX_SPLIT,
            BM_OWN=packed._power_of_two(group),
            BM_SHARED=packed._power_of_two(max(PAIRS, group)), **constants,
            num_warps=4, num_stages=3 if small else 1,
        )  # fmt: skip
        merge[(slots, heads)](
            parts, sums, lengths, prefix_lengths, sinks, out, lse, splits, prefix_splits,
            OWN=OWN_SPLIT, SHARED=PREFIX_SPLIT, DV=value_dim, BDV=packed._power_of_two(value_dim),
            num_warps=1,
        )  # fmt: skip
    return out, lse
