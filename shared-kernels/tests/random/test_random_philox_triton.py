"""The device function of Philox against the definition."""

import pytest
import torch
from shared_kernels.random import philox4x32

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
# conftest.py has chosen the interpreter or the GPU before this import decorates the functions
device_philox = pytest.importorskip("shared_kernels.random.triton").philox4x32


@triton.jit
def words_kernel(
    counter_ptr, out_ptr, k0, k1, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + i).to(tl.uint32, bitcast=True)
    c1 = tl.load(counter_ptr + N + i).to(tl.uint32, bitcast=True)
    c2 = tl.load(counter_ptr + 2 * N + i).to(tl.uint32, bitcast=True)
    c3 = tl.load(counter_ptr + 3 * N + i).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = device_philox(
        c0, c1, c2, c3, k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), WIDE
    )
    tl.store(out_ptr + i, w0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + N + i, w1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 * N + i, w2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 * N + i, w3.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("wide", [True, False])
def test_a_million_counters(kernel_device, wide):
    n, block = 1 << 20, (1 << 18 if kernel_device == "cpu" else 1024)
    counters = torch.randint(0, 1 << 32, (4, n), generator=torch.Generator().manual_seed(3))
    key = torch.tensor([0xA4093822, 0x299F31D0])
    out = torch.empty(4, n, dtype=torch.int32, device=kernel_device)
    words_kernel[(n // block,)](
        counters.to(torch.int32).to(kernel_device),
        out,
        *key.to(torch.int32).tolist(),
        N=n,
        BLOCK=block,
        WIDE=wide,
    )
    assert torch.equal(out.cpu().long() & 0xFFFFFFFF, philox4x32(counters.T, key).T)
