"""Cryptographically secure noise: the ChaCha20 block function and float64 normals on top."""

from shared_kernels.random.chacha.api import chacha20_words
from shared_kernels.random.chacha.keys import key_from_seed, new_key

__all__ = ["chacha20_words", "key_from_seed", "new_key"]
