"""Who draws: a 64-bit key for each sample, a closed form of what it is a sample of."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from shared_kernels.random import constants, derive_seed, philox4x32
from shared_kernels.random.reference import split_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MASK = (1 << 32) - 1


def prompt_uid(ids: Sequence[int]) -> int:
    """Return 64 bits that stand for a prompt's token ids."""
    data = np.asarray(ids, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def sample_keys(seed: int, step: int, uids: Sequence[int], samples: Sequence[int]) -> Tensor:
    """Return the keys of samples, int64 ``(R, 2)``.

    Philox4x32-10 of (prompt, sample) under the key of (seed, step), in a domain of its own. They
    depend on neither ranks nor devices nor on how samples are batched.

    Args:
        seed: Of the run.
        step: Of the training: each has its own samples.
        uids: `prompt_uid` of each sample.
        samples: Number of each sample among those of its prompt, below 2^32.
    """
    uid = torch.tensor([[u & _MASK, u >> 32] for u in uids], dtype=torch.int64).reshape(-1, 2)
    sample = torch.tensor(samples, dtype=torch.int64)
    domain = torch.full_like(sample, constants.DOMAIN_TOKEN << constants.DOMAIN_SHIFT)
    counter = torch.stack([uid[:, 0], uid[:, 1], sample, domain], -1)
    return philox4x32(counter, split_seed(derive_seed(seed, step)))[:, :2].contiguous()
