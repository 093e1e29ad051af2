"""Secure Gaussian noise on a clipped sum against the same work in plain torch.

``torch.randn`` alone is not secure and does only the draw; the arms below it also add the noise
and divide. The sum of four draws is how float64-like resolution is had from float32 ones
(Holohan and Braghin, "Secure random sampling in differential privacy", ESORICS 2021).
"""

from __future__ import annotations

import torch
from shared_kernels.bench import Arm, Workload, benchmark

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STD, DIVISOR = 0.8, 256.0
STREAM = {"step": (1 << 33) + 17, "uid": 7, "std": STD, "divisor": DIVISOR}


@benchmark
def gaussian_step(device):
    for dtype in DTYPES:
        yield _workload(device, _elements(device), dtype)


def _elements(device):
    if device == "cpu":
        return 1 << 22
    free, _ = torch.cuda.mem_get_info()
    elements = 1 << 30
    # The total, the result and two draws of the largest arm, of four bytes each.
    while 20 * elements > free:
        elements //= 2
    return elements


def _workload(device, elements, dtype):
    from shared_kernels.ops import dp
    from shared_kernels.random.chacha import key_from_seed

    key = key_from_seed(1)
    total = torch.randn(elements, device=device)
    out = torch.empty(elements, dtype=DTYPES[dtype], device=device)
    generator = torch.Generator(device).manual_seed(1)

    def ours():
        dp.gaussian_step(total, out, key=key, **STREAM)

    def draw():
        return torch.randn(elements, device=device, generator=generator)

    def add(z, scale):
        out.copy_(z.mul_(scale).add_(total).div_(DIVISOR))

    def summed():
        z = draw()
        for _ in range(3):
            z.add_(draw())
        add(z, STD / 2)

    def check():
        ours()
        window = min(5000, elements)
        for start in (0, (elements - window) // 2 + 11, elements - window):
            inside = slice(start, min(start + window, elements))
            expected = torch.empty(inside.stop - start, dtype=out.dtype)
            dp.gaussian_step(
                total[inside].cpu(), expected, key=key, start=start, impl="reference", **STREAM
            )
            torch.testing.assert_close(out[inside].cpu(), expected, rtol=0, atol=0)

    count = total.nbytes + out.nbytes
    return Workload(
        name=f"gaussian_step/{dtype}",
        params={"elements": elements, "total": "fp32", "result": dtype},
        device=device,
        check=check,
        baseline="torch.randn",
        arms=[
            Arm(name="torch.randn", fn=draw, bytes=total.nbytes),
            Arm(name="torch.randn, add, divide", fn=lambda: add(draw(), STD), bytes=count),
            Arm(name="sum of four torch.randn, add, divide", fn=summed, bytes=count),
            Arm(name="gaussian_step", fn=ours, bytes=count),
        ],
    )
