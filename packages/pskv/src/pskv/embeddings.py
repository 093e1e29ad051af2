"""Rows given as embeddings: which vectors are equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ELEMENTS = 1 << 22


def number_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct vectors, so that rows of them can be compared as token ids are.

    Bits are compared, by a hash and then in full: vectors that share a hash and are not equal all
    get numbers of their own, which costs sharing and no correctness.

    Args:
        vectors: float ``(M, d)``.

    Returns:
        int64 ``(M,)`` on the CPU, and the distinct vectors ``(U, d)`` in the order of the numbers.
    """
    count, width = vectors.shape
    if not count:
        return torch.zeros(0, dtype=torch.int64), vectors
    bits = vectors.contiguous().view(_BITS[vectors.element_size()])
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (width,), generator=generator).to(vectors.device)
    step = max(1, _CHUNK_ELEMENTS // width)
    hashes = torch.cat([(part.long() * weights).sum(1) for part in bits.split(step)])
    distinct, number = torch.unique(hashes, return_inverse=True)
    places = torch.arange(count, device=vectors.device)
    first = torch.full_like(distinct, count).scatter_reduce_(0, number, places, "amin")
    chosen = first[number]
    for rows, others in zip(places.split(step), chosen.split(step), strict=True):
        if not torch.equal(bits[rows], bits[others]):
            return places.cpu(), vectors
    return number.cpu(), vectors[first]
