"""Number formats in which a store keeps the weights that may change.

``fp32`` keeps a float32 master, ``bf16`` and ``fp16`` a 16-bit one, and ``bf16x2`` splits a float32
into two 16-bit streams without loss: ``hi = (bits + 0x8000) >> 16`` is a bfloat16 that can be
computed with alone, and ``lo = int16(bits - (hi << 16))`` restores the rest. Only ``hi`` has to
travel when a block is merely read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared_kernels.ops.zo import join_bf16x2, split_bf16x2

__all__ = ["CODECS", "Codec"]


@dataclass(frozen=True)
class Codec:
    """How one float32 weight is kept: the dtype of the main stream, and whether ``lo`` exists."""

    name: str
    main: torch.dtype
    has_lo: bool = False

    @property
    def exact(self) -> bool:
        """Whether any float32 survives a round trip."""
        return self.has_lo or self.main is torch.float32

    @property
    def bytes_per_element(self) -> int:
        """Bytes of both streams."""
        return self.main.itemsize + (2 if self.has_lo else 0)

    def encode(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode a float tensor into (main, lo or None); a lossy codec rounds to nearest."""
        if self.has_lo:
            return split_bf16x2(value.to(torch.float32))
        return value.to(self.main), None

    def decode(self, main: torch.Tensor, lo: torch.Tensor | None) -> torch.Tensor:
        """Decode to float32."""
        return join_bf16x2(main, lo) if lo is not None else main.to(torch.float32)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("fp32", torch.float32),
        Codec("bf16x2", torch.bfloat16, has_lo=True),
        Codec("bf16", torch.bfloat16),
        Codec("fp16", torch.float16),
    )
}
