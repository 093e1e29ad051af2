"""Clipped sums of per-unit weight gradients against the weight gradient without privacy.

The baseline is the one product that training without privacy needs. Every other arm clips each
unit's part of it; ``materialise`` keeps all U x p x d of them, as hook-based tools do. The arms
named ``only`` are the halves that the strategies are made of.
"""

from __future__ import annotations

import functools

import torch
from shared_kernels.bench import Arm, Workload, benchmark

#: Units, tokens per unit, d, p.
SMOLLM2 = {
    "q": (8, 128, 576, 576),
    "up": (8, 128, 576, 1536),
    "down": (8, 128, 1536, 576),
}
LLAMA = {
    "1b/q": (8, 512, 2048, 2048),
    "1b/up": (8, 512, 2048, 8192),
    "1b/up, long": (8, 2048, 2048, 8192),
    "8b/q": (8, 512, 4096, 4096),
    "8b/up": (8, 512, 4096, 14336),
    "8b/up, long": (4, 2048, 4096, 14336),
}


@benchmark
def smollm2(device):
    dtype = "fp32" if device == "cpu" else "bf16"
    for name, shape in SMOLLM2.items():
        yield _workload(device, f"smollm2/{name}", shape, dtype)


@benchmark
def llama(device):
    if device != "cpu":
        for name, shape in LLAMA.items():
            yield _workload(device, f"llama-{name}", shape, "bf16")


class _Layer:
    """One layer's rows, and the ways to a clipped sum."""

    def __init__(self, device, shape, dtype):
        from shared_kernels.ops import dp
        from shared_kernels.testing.segments import make_units

        self.dp = dp
        self.count, self.length, d, p = shape
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.units = make_units([self.length] * self.count, d, p, dtype).on(device)
        self.a, self.g, self.cu = self.units[:3]
        self.out = torch.zeros(p, d, device=device)
        # clips about half of the units
        self.threshold = float(dp.segment_mm_norm(self.a, self.g, self.cu).sqrt().median())
        self.scale = torch.ones(self.count, device=device)

    def baseline(self):
        return torch.mm(self.g.T, self.a)

    def gram_norm(self):
        n2, absolute = self.dp.segment_gram_norm(self.a, self.g, self.cu, max_seqlen=self.length)
        return n2 + self.dp.gram_error_bound(absolute, self.cu, self.a.shape[1], self.g.shape[1])

    def mm_norm(self):
        return self.dp.segment_mm_norm(self.a, self.g, self.cu)

    def scaled_mm(self, scale):
        self.dp.segment_scaled_mm(self.a, self.g, self.cu, scale, self.out)

    def gram(self):
        self.scaled_mm(self.dp.clip_factors(self.gram_norm(), self.threshold))

    def recompute(self):
        self.scaled_mm(self.dp.clip_factors(self.mm_norm(), self.threshold))

    def spill(self):
        self.dp.segment_mm_clip(self.a, self.g, self.cu, self.threshold, self.out, equal=True)

    def materialise(self):
        a, g = (x.unflatten(0, (self.count, self.length)) for x in (self.a, self.g))
        options = {"out_dtype": torch.float32} if a.is_cuda else {}
        products = torch.bmm(g.mT, a, **options)
        n2 = products.flatten(1).square().sum(1)
        scale = self.dp.clip_factors(n2, self.threshold)
        self.out += torch.einsum("u,upd->pd", scale, products)

    STRATEGIES = ("gram", "recompute", "spill", "materialise")

    def check(self):
        from shared_kernels.testing.segments import assert_mm_norm, assert_scaled_sum

        n2 = self.mm_norm()
        assert_mm_norm(self.units, n2, bias=False)
        scale = self.dp.clip_factors(n2, self.threshold)
        for strategy in self.STRATEGIES:
            self.out.fill_(0.5)
            getattr(self, strategy)()
            assert_scaled_sum(self.units, scale, self.out)


def _workload(device, name, shape, dtype):
    layer = _Layer(device, shape, dtype)
    count, length, d, p = shape
    product = 2 * count * length * d * p
    triangle = count * length * (length + 1) * (d + p)
    arm = functools.partial(Arm, flops=product, flops_dtype=dtype)
    return Workload(
        name=f"clipped_sum/{name}",
        params={"units": count, "tokens": length, "d": d, "p": p, "dtype": dtype},
        device=device,
        check=layer.check,
        baseline="without privacy",
        arms=[
            arm(name="without privacy", fn=layer.baseline),
            *(arm(name=strategy, fn=getattr(layer, strategy)) for strategy in layer.STRATEGIES),
            arm(name="gram norm only", fn=layer.gram_norm, flops=triangle),
            arm(name="product norm only", fn=layer.mm_norm),
            arm(name="scaled sum only", fn=lambda: layer.scaled_mm(layer.scale)),
        ],
    )
