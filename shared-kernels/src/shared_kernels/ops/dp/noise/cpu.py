"""The noise step on the CPU: numba, bit-equal to the reference."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shared_kernels._parallel import parallel_for
from shared_kernels.ops.dp.noise.constants import GRID
from shared_kernels.ops.dp.noise.reference import scales, store
from shared_kernels.random.chacha.constants import SEGMENT
from shared_kernels.random.chacha.cpu import initial_state, normal_segment
from shared_kernels.random.chacha.keys import key_words
from shared_kernels.random.chacha.reference import stream_nonce

_U64, _GRID, _HALF = np.uint64, np.float64(GRID), np.float64(0.5)
#: Segments converted at a time: 256 KiB of float64 stay in the second-level cache.
_CHUNK_SEGMENTS = 16


@njit(
    "void(float64[::1], uint64, uint32[::1], float64, float64)",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _noise(values, start, state, to_grid, from_grid):
    """Replace totals by noised means; ``start`` is the index of ``values[0]``."""
    words = np.empty(4096, np.uint32)
    z = np.empty(2048, np.float64)
    done = 0
    while done < values.shape[0]:
        element = start + _U64(done)
        skip = np.int64(element & _U64(2047))
        take = min(2048 - skip, values.shape[0] - done)
        normal_segment(state, element >> _U64(11), words, z)
        part = values[done : done + take]
        noise = z[skip : skip + take]
        for j in range(take):
            # math.floor would go through int64
            part[j] = np.floor(part[j] * to_grid + noise[j] * _GRID + _HALF) * from_grid
        done += take


def gaussian_step(
    out: Tensor,
    total: Tensor | None,
    key: Tensor,
    step: int,
    uid: int,
    domain: int,
    std: float,
    divisor: float,
    start: int,
) -> None:
    """Write one noised mean; arguments are those of the op (see `op.py`), for one parameter."""
    total = out if total is None else total
    to_grid, from_grid = scales(std, divisor) if std else (0.0, 0.0)
    first, last = start // SEGMENT, -(-(start + out.numel()) // SEGMENT)

    def run(begin: int, end: int) -> None:
        state = initial_state(key_words(key), stream_nonce(step, uid, domain, 0))
        for segment in range(first + begin, first + end, _CHUNK_SEGMENTS):
            # cut at segment boundaries of the stream, so that no segment is drawn twice
            stop = min(segment + _CHUNK_SEGMENTS, first + end)
            low = max(segment * SEGMENT - start, 0)
            high = min(stop * SEGMENT - start, out.numel())
            values = total[low:high].to(torch.float64, copy=True)
            if std:
                _noise(values.numpy(), _U64(start + low), state, to_grid, from_grid)
            else:
                values.div_(divisor)
            store(out[low:high], values)

    parallel_for(last - first, run)
