"""Public function of the ChaCha20 key stream."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared_kernels._checks import check_range, message
from shared_kernels.random.chacha import constants as k
from shared_kernels.random.chacha import op
from shared_kernels.random.chacha.keys import check_key


def chacha20_words(
    count: int,
    *,
    key: Tensor,
    nonce: Sequence[int],
    counter: int = 0,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Tensor:
    """Compute blocks ``counter .. counter + count`` of the ChaCha20 key stream of RFC 8439.

    Deterministic, and bit-equal between implementations and devices. Writes 64 bytes and computes
    976 integer operations per block.

    Args:
        count: Number of blocks.
        key: int32 ``(8,)`` on the CPU: the 32 bytes as little-endian words; see `new_key`.
        nonce: Three words in [0, 2^32): the 12 bytes as little-endian words.
        counter: First block counter; ``counter + count`` is at most 2^32.
        device: Where to create the result.
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.

    Returns:
        int32 ``(count, 16)`` of uint32 bit patterns; as little-endian bytes, the key stream.

    Raises:
        TypeError: The key is not an int32 tensor, or a number is not an integer.
        ValueError: An argument is out of range or of another shape.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_key(key)
    check_range("counter", counter, 0, 1 << 32, "take another nonce beyond 2^32 blocks")
    check_range("count", count, 0, (1 << 32) - counter + 1, "take another nonce beyond 2^32 blocks")
    if len(nonce) != 3:
        raise ValueError(message("nonce", "three words", nonce, "split the 12 bytes into words"))
    for i, word in enumerate(nonce):
        check_range(f"nonce[{i}]", word, 0, 1 << 32, "pass unsigned 32-bit words")
    out = torch.empty(count, k.WORDS, dtype=torch.int32, device=device)
    if count:
        op.chacha20_words_(out, key, *nonce, counter, impl)
    return out
