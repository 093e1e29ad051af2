"""Sampling by Gumbel-max on the CPU: numba, one row after the other, the reference's tokens.

Sums are float64 and their order depends on the vocabulary alone, so a row's numbers do not depend
on the rows beside it.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shared_kernels._parallel import parallel_for
from shared_kernels.ops.sampling import reference
from shared_kernels.random import constants as k
from shared_kernels.random.cpu import gumbel, philox_columns

_U64 = np.uint64
_F32 = np.float32
_MASK = _U64(0xFFFFFFFF)
_DOMAIN = _U64(k.DOMAIN_TOKEN << k.DOMAIN_SHIFT)


@njit(nogil=True, cache=True, error_model="numpy")
def _sample(logits, keys, index, threshold, temperature, low, high, tokens, numbers):
    vocab = logits.shape[1]
    words = np.empty(1024, np.uint32)
    z = np.empty(vocab, np.float32)
    score = np.empty(1024, np.float32)
    for row in range(low, high):
        line = logits[row]
        peak = _F32(-np.inf)
        bad = False
        for token in range(vocab):
            value = line[token] / temperature if temperature > 0 else line[token]
            z[token] = value
            bad |= not (value < np.inf)
            peak = max(peak, value)
        if bad or not peak > -np.inf:
            tokens[row] = -1
            numbers[:, row] = np.nan
            continue
        total = weighted = kept = 0.0
        limit = threshold[row] if threshold.shape[0] else _F32(-np.inf)
        for token in range(vocab):
            value = z[token]
            if value > -np.inf:
                gap = np.float64(value) - np.float64(peak)
                weight = math.exp(gap)
                total += weight
                weighted += weight * gap
                if value >= limit:
                    kept += weight
        best = _F32(-np.inf)
        best_token = vocab
        k0 = _U64(keys[row, 0]) & _MASK
        k1 = _U64(keys[row, 1]) & _MASK
        position = _U64(index[row]) & _MASK
        for start in range(0, vocab, 1024):
            stop = min(vocab, start + 1024)
            part = z[start:stop]
            if temperature > 0:
                philox_columns(
                    (position << _U64(32)) | _U64(start // 4), 256, _U64(0), _DOMAIN, k0, k1, words
                )
                for j in range(stop - start):
                    score[j] = part[j] + gumbel(words[j])
            else:
                for j in range(stop - start):
                    score[j] = part[j]
            for j in range(stop - start):
                if score[j] > best and part[j] >= limit:
                    best = score[j]
                    best_token = start + j
        if best_token == vocab:
            tokens[row] = -1
            numbers[:, row] = np.nan
            continue
        tokens[row] = best_token
        log_total = math.log(total)
        numbers[0, row] = np.float64(z[best_token]) - np.float64(peak) - log_total
        numbers[1, row] = math.log(kept) - log_total if threshold.shape[0] else 0.0
        numbers[2, row] = log_total - weighted / total


def gumbel_sample(
    logits: Tensor, keys: Tensor, index: Tensor, threshold: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `reference.gumbel_sample` defines; float64 by the reference."""
    if logits.dtype == torch.float64:
        return reference.gumbel_sample(logits, keys, index, threshold, temperature)
    rows = logits.shape[0]
    tokens, numbers = np.empty(rows, np.int64), np.empty((3, rows), np.float32)
    if rows:
        lines = logits.float().numpy()
        limits = np.empty(0, np.float32) if threshold is None else threshold.float().numpy()
        arguments = (keys.numpy(), index.numpy(), limits, _F32(temperature))

        def work(low: int, high: int) -> None:
            _sample(lines, *arguments, low // 8, high // 8, tokens, numbers)

        # a row is worth a thread of its own
        parallel_for(8 * rows, work)
    return torch.from_numpy(tokens), *(x.clone() for x in torch.from_numpy(numbers))
