"""The bf16x2 split is lossless."""

from __future__ import annotations

import torch
from shared_kernels.offload import CODECS, join_bf16x2, split_bf16x2


def assert_lossless(bits):
    value = bits.view(torch.float32)
    value = value[torch.isfinite(value)]
    hi, lo = split_bf16x2(value)
    assert hi.dtype is torch.bfloat16
    assert lo.dtype is torch.int16
    assert torch.equal(join_bf16x2(hi, lo).view(torch.int32), value.view(torch.int32))
    return value, hi


def test_split_is_lossless_on_random_bits():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 24,), generator=generator, dtype=torch.int64)
    assert_lossless(bits.to(torch.int32))


def test_split_is_lossless_on_every_tie_and_its_neighbours():
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper + lower
        assert_lossless(torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32))


def test_upper_half_is_the_value_rounded():
    generator = torch.Generator().manual_seed(1)
    value, hi = assert_lossless(torch.randn(1 << 16, generator=generator).view(torch.int32))
    nearest = value.to(torch.bfloat16)
    ties = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(hi[~ties], nearest[~ties])


def test_codecs_round_trip():
    value = torch.randn(1000)
    for name, codec in CODECS.items():
        decoded = codec.decode(*codec.encode(value))
        assert torch.equal(decoded, value) == codec.exact, name
        assert codec.bytes_per_element == {"fp32": 4, "bf16x2": 4, "bf16": 2, "fp16": 2}[name]
