"""Launches of the sampling kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.sampling import fields as f

#: Tokens of the vocabulary that a program scores, in segments of 1024.
SEGMENTS: Final = 4
MOST_SLOTS: Final = 1024


def unsupported(logits: Tensor, *args: Any) -> str | None:
    """Say why the kernels cannot take these arguments, or None."""
    return "float64 has no kernel" if logits.dtype == torch.float64 else None


def refill_unsupported(slots: Tensor, *args: Any) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    return f"more than {MOST_SLOTS} slots" if slots.shape[1] > MOST_SLOTS else None


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")


def _power_of_two(size: int) -> int:
    return max(2, 1 << (size - 1).bit_length())


def gumbel_sample(
    logits: Tensor, keys: Tensor, index: Tensor, threshold: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `reference.gumbel_sample` defines: parts of the vocabulary, then their merge."""
    _refuse(unsupported(logits))
    from shared_kernels.ops.sampling import triton as kernels

    rows, vocab = logits.shape
    parts = max(1, -(-vocab // (1024 * SEGMENTS)))
    sums = logits.new_empty(rows, parts, 5, dtype=torch.float32)
    best = logits.new_empty(rows, parts, dtype=torch.int32)
    token = logits.new_empty(rows, dtype=torch.int64)
    logprob, kept, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if not rows:
        return token, logprob, kept, entropy
    kernel: Any = kernels.sample_kernel
    merge: Any = kernels.sample_merge_kernel
    with torch.cuda.device_of(logits):
        kernel[(rows, parts)](
            logits, keys, index, threshold, sums, best, vocab, logits.stride(0), keys.stride(0),
            keys.stride(1), temperature, NOISE=temperature > 0, SEGMENTS=SEGMENTS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        merge[(rows,)](
            logits, sums, best, threshold, token, logprob, kept, entropy, vocab, parts,
            logits.stride(0), temperature, NOISE=temperature > 0, BLOCK=_power_of_two(parts),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return token, logprob, kept, entropy


def slot_refill_(
    slots: Tensor,
    rows: Tensor,
    queue: Tensor,
    counters: Tensor,
    order: Tensor,
    tiles: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    token: Tensor,
    logprob: Tensor,
    eos: Tensor,
    places: int,
    tile: int,
    record: bool,
) -> None:
    """Do what `reference.slot_refill_` defines, in one program."""
    _refuse(refill_unsupported(slots))
    from shared_kernels.ops.sampling import triton as kernels

    lanes = slots.shape[1]
    if not lanes:
        return
    kernel: Any = kernels.refill_kernel
    with torch.cuda.device_of(slots):
        kernel[(1,)](
            slots, rows, queue, counters, order, tiles, tokens, logprobs, token, logprob, eos,
            lanes, rows.shape[1], tokens.stride(0), len(eos), places, tile,
            RECORD=record, BLOCK=max(16, _power_of_two(lanes)), CHUNK=16,
            SLOT_FIELDS=f.SLOT_FIELDS, num_warps=8,
        )  # fmt: skip
