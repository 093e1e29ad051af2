"""Keys of the secure stream."""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor

_MASK = 0xFFFFFFFF


def _tensor(key: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(key, "<i4").astype(np.int32))


def new_key() -> Tensor:
    """Draw a 256-bit key from the operating system's cryptographic source.

    Keep it out of checkpoints and logs: who knows it can subtract the noise.

    Returns:
        int32 ``(8,)`` on the CPU.
    """
    return _tensor(os.urandom(32))


def key_from_seed(seed: int) -> Tensor:
    """Derive a key from a seed, for runs that must be repeatable and are not secure.

    The key is SHA-256 of ``shared-kernels chacha20 key`` and the seed's eight little-endian bytes.
    Who guesses the seed can subtract the noise, so nothing drawn with it is private.

    Args:
        seed: In [0, 2^64).

    Returns:
        int32 ``(8,)`` on the CPU.

    Raises:
        ValueError: The seed is out of range.
    """
    check_range("seed", seed, 0, 1 << 64, "pass a non-negative 64-bit seed")
    text = b"shared-kernels chacha20 key" + int(seed).to_bytes(8, "little")
    return _tensor(hashlib.sha256(text).digest())


def check_key(key: Tensor) -> None:
    """Check that ``key`` is what `new_key` returns.

    Raises:
        TypeError: Not an int32 tensor.
        ValueError: Other shape, or not on the CPU, where reading it costs no synchronisation.
    """
    check_tensor("key", key, dtypes=(torch.int32,), shape=(8,), device=torch.device("cpu"))


def key_words(key: Tensor) -> list[int]:
    """Return the eight words of a key as unsigned integers."""
    return [word & _MASK for word in key.tolist()]
