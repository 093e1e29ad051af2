"""What a store can keep without loss."""

from __future__ import annotations

import torch
from shared_kernels.offload import CODECS


def test_codecs_round_trip():
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for name, codec in CODECS.items():
        decoded = codec.decode(*codec.encode(value))
        assert torch.equal(decoded, value) == codec.exact, name
        assert codec.bytes_per_element == {"fp32": 4, "bf16x2": 4, "bf16": 2, "fp16": 2}[name]
