"""Decoding attention on the CPU: numba, one slot after the other, all heads of a key at once.

Nothing is copied, repeated or padded, and the sums of a slot depend on no other slot.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shared_kernels._parallel import parallel_for
from shared_kernels.ops.prefix_attention.decode import reference

_F32 = np.float32


# Sums of products may be reordered to fill SIMD lanes: how, is fixed when this is compiled. Rows
# are taken one by one, because numba does not know of slices that they are contiguous.
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _dot(a, b):
    total = _F32(0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _logits(q, keys, begin, end, scale, softcap, logits):
    heads = keys.shape[1]
    group = q.shape[0] // heads
    for j in range(begin, end):
        for head in range(heads):
            key = keys[j, head]
            for h in range(head * group, (head + 1) * group):
                z = _dot(q[h], key) * scale
                if softcap > 0:
                    z = softcap * _F32(math.tanh(z / softcap))
                logits[h, j - begin] = z


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _add(weights, values, begin, end, acc):
    heads = values.shape[1]
    group = acc.shape[0] // heads
    for j in range(begin, end):
        for head in range(heads):
            value = values[j, head]
            for h in range(head * group, (head + 1) * group):
                weight = weights[h, j - begin]
                line = acc[h]
                for d in range(len(line)):
                    line[d] += weight * value[d]


@njit(nogil=True, cache=True, error_model="numpy")
def _decode(q, k, v, shared_k, shared_v, lengths, starts, prefixes, capacity, scale, window,
            softcap, sinks, low, high, out, lse):  # fmt: skip
    heads = q.shape[1]
    for slot in range(low, high):
        length = lengths[slot]
        if length == 0:
            out[slot] = 0
            lse[slot] = -np.inf
            continue
        prefix = prefixes[slot]
        skipped = max(0, prefix + length - window) if window > 0 else 0
        a = starts[slot] + min(skipped, prefix)
        b = starts[slot] + prefix
        c = slot * capacity + max(0, skipped - prefix)
        e = slot * capacity + length
        logits = np.empty((heads, b - a + e - c), np.float32)
        _logits(q[slot], shared_k, a, b, scale, softcap, logits[:, : b - a])
        _logits(q[slot], k, c, e, scale, softcap, logits[:, b - a :])
        for h in range(heads):
            line = logits[h]
            peak = line[0]
            for j in range(1, len(line)):
                peak = max(peak, line[j])
            if sinks.shape[0]:
                peak = max(peak, sinks[h])
            total = 0.0
            if sinks.shape[0]:
                total += math.exp(np.float64(sinks[h]) - np.float64(peak))
            for j in range(len(line)):
                weight = _F32(math.exp(np.float64(line[j]) - np.float64(peak)))
                total += np.float64(weight)
                line[j] = weight
            lse[slot, h] = np.float64(peak) + math.log(total)
            scaled = _F32(1 / total)
            for j in range(len(line)):
                line[j] *= scaled
        acc = np.zeros((heads, v.shape[2]), np.float32)
        _add(logits[:, : b - a], shared_v, a, b, acc)
        _add(logits[:, b - a :], v, c, e, acc)
        out[slot] = acc


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
    """Compute what `reference.decode_attention` defines; float64 by the reference."""
    if q.dtype == torch.float64:
        return reference.decode_attention(
            q, k, v, shared_k, shared_v, lengths, starts, prefix_lengths, order, tiles, capacity,
            tile, longest, scale, window, softcap, sinks,
        )  # fmt: skip
    out = np.empty((q.shape[0], q.shape[1], v.shape[2]), np.float32)
    lse = np.empty(q.shape[:2], np.float32)
    no_sinks = np.empty(0, np.float32)
    arguments = (
        *(x.float().contiguous().numpy() for x in (q, k, v, shared_k, shared_v)),
        *(x.numpy() for x in (lengths, starts, prefix_lengths)), capacity, _F32(scale),
        window or 0, _F32(softcap or 0.0),
        no_sinks if sinks is None else sinks.float().contiguous().numpy(),
    )  # fmt: skip

    def work(low: int, high: int) -> None:
        _decode(*arguments, low // 8, high // 8, out, lse)

    # a slot is worth a thread of its own
    parallel_for(8 * q.shape[0], work)
    return torch.from_numpy(out).to(q.dtype), torch.from_numpy(lse)
