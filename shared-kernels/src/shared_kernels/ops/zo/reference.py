"""Zeroth-order materialisation in plain torch: the definition.

For every element, with ``z_k`` the noise of record ``k`` and ``z`` that of the perturbation::

    y = master;  for each record k:  y = a_k y - b_k z_k          (a_k = 1 where decay is off)
    plus = round(y + eps z),  minus = round(y - eps z)

Each product and each difference is rounded to float32 on its own, in that order. Source: the update
of MeZO (Malladi et al., NeurIPS 2023, algorithm 1), deferred as in ZO2 (Wang et al., COLM 2025).
"""

import torch
from torch import Tensor

from shared_kernels.ops.zo.tiles import DECAY_FLAG, FLAGS, START_HIGH, START_LOW, TILE, UID, VALID
from shared_kernels.random.reference import TILE_DRAWS, dither_tiles, split_seed

_MASK = 0xFFFFFFFF
_NAN = 0x7FC00000
#: Tiles worked on at a time; bounds the temporaries to a few hundred MiB.
_CHUNK_TILES = 256


def join_bf16x2(hi: Tensor, lo: Tensor) -> Tensor:
    """Return the float32 values of a bf16x2 pair: ``bits = (hi_bits << 16) + lo``.

    Args:
        hi: bfloat16 ``(...)``.
        lo: int16 ``(...)``.

    Returns:
        float32 ``(...)``.
    """
    bits = (hi.view(torch.int16).long() << 16) + lo.long()
    return bits.to(torch.int32).view(torch.float32)


def split_bf16x2(y: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into ``hi = (bits + 0x8000) >> 16`` and ``lo = bits - (hi << 16)``, losslessly.

    ``hi`` is ``y`` rounded to bfloat16, ties away from zero. Every NaN becomes the quiet NaN
    0x7FC00000 first, so that ``hi`` alone is a NaN too.

    Args:
        y: float32 ``(...)``.

    Returns:
        bfloat16 ``(...)`` and int16 ``(...)``.
    """
    bits = torch.where(torch.isnan(y), _NAN, y.contiguous().view(torch.int32).long() & _MASK)
    hi = (bits + 0x8000) >> 16
    return hi.to(torch.int16).view(torch.bfloat16), (bits - (hi << 16)).to(torch.int16)


def round_stochastic(y: Tensor, dither: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with a probability equal to the truncated fraction.

    Args:
        y: float32 ``(...)``. Infinities and NaN stay what they are.
        dither: int64 ``(...)``, uniform in [0, 2^16).

    Returns:
        bfloat16 ``(...)``.
    """
    bits = y.view(torch.int32).long() & _MASK
    rounded = ((bits + dither) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(y), rounded, y.to(torch.bfloat16))


def zo_materialize(
    master: Tensor,
    lo: Tensor | None,
    tiles: Tensor,
    keys: Tensor,
    coefs: Tensor,
    plus: Tensor | None,
    minus: Tensor | None,
    perturb: bool,
    seed: int,
    direction: int,
    eps: float,
    fold: bool,
    stochastic: bool,
    dither_seed: int,
    dist: str,
) -> None:
    """Replay, perturb and fold in place; arguments are those of the op (see `op.py`)."""
    device = master.device
    draw = TILE_DRAWS[dist]
    eps32 = torch.tensor(eps, dtype=torch.float32, device=device)
    view = lambda tensor, chunk: tensor.view(-1, TILE)[chunk]  # noqa: E731
    for first in range(0, tiles.shape[0], _CHUNK_TILES):
        chunk = slice(first, first + _CHUNK_TILES)
        table = tiles[chunk].long()
        uid = table[:, UID] & _MASK
        start = (table[:, START_LOW] & _MASK) | (table[:, START_HIGH] << 32)
        valid = torch.arange(TILE, device=device) < table[:, VALID, None]
        decays = (table[:, FLAGS, None] & DECAY_FLAG).bool()

        stored = view(master, chunk)
        y = stored.float() if lo is None else join_bf16x2(stored, view(lo, chunk))
        for (low, high, k), (a, b) in zip(keys.long(), coefs, strict=True):
            z = draw(uid, start, torch.stack([low, high]) & _MASK, k)
            y = torch.where(decays, a * y, y) - b * z

        if perturb:
            z = draw(uid, start, split_seed(seed, device), torch.tensor(direction, device=device))
            t = eps32 * z
        for out, sign in ((plus, 1), (minus, -1)):
            if out is not None:
                value = (y + t if sign > 0 else y - t) if perturb else y
                view(out, chunk).copy_(torch.where(valid, value, 0.0))

        if fold and lo is not None:
            hi, low_half = split_bf16x2(y)
            stored.copy_(torch.where(valid, hi, stored))
            view(lo, chunk).copy_(torch.where(valid, low_half, view(lo, chunk)))
        elif fold:
            if stochastic:
                y = round_stochastic(y, dither_tiles(uid, start, split_seed(dither_seed, device)))
            stored.copy_(torch.where(valid, y.to(stored.dtype), stored))
