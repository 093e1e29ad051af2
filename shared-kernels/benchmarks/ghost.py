"""Questions about per-sample gradients of a linear layer, against torch's ways to form them.

On a GPU 64 samples of 512 tokens through SmolLM2's up projection (576 to 1536), in float32 and
bfloat16; on a CPU fewer and smaller.

- ``ghost_dot`` asks for inner products with one matrix. ``vmap(grad)`` forms every gradient by
  torch.func and multiplies it; ``matmul`` keeps the products of all tokens.
- ``ghost_dot_low_rank`` does so for a matrix of rank 16.
- ``pairwise`` asks for all inner products of two sets, both ways; ``vmap(grad)`` forms both.
- ``kron_cov`` adds to both Kronecker factors; ``matmul`` works on float32 copies.
- ``kron_sketch`` draws signs that are not kept; ``matmul`` has them in memory.
"""

from __future__ import annotations

import functools

import torch
from shared_kernels.bench import Arm, Workload, benchmark

RANK = 16


class _Layer:
    """Inputs, output gradients, and what torch makes of them."""

    def __init__(self, device, dtype, tokens=None):
        small = device == "cpu"
        self.samples, self.tokens, self.i, self.o = (
            (16, 32, 192, 256) if small else (64, 512, 576, 1536)
        )
        self.tokens = tokens or self.tokens
        self.device, self.name = device, dtype
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.generator = torch.Generator(device).manual_seed(0)
        self.x = self.draw(self.samples, self.tokens, self.i)
        self.d = self.draw(self.samples, self.tokens, self.o)
        self.rows = self.samples * self.tokens

    def draw(self, *shape):
        drawn = torch.randn(*shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype)

    def gradients(self, x=None, d=None):
        """Per-sample gradients by torch.func, (b, o, i)."""
        weight = torch.zeros(self.o, self.i, device=self.device, dtype=self.dtype)

        def loss(weight, x, d):
            return (torch.nn.functional.linear(x, weight) * d).sum()

        x, d = self.x if x is None else x, self.d if d is None else d
        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, x, d)

    def exact(self, samples):
        """Float64 gradients of the first samples."""
        return self.d[:samples].double().mT @ self.x[:samples].double()

    def workload(self, name, check, flops, baseline, arms, **params):
        arm = functools.partial(Arm, flops=flops, flops_dtype=self.name)
        return Workload(
            name=f"{name}/{self.name}", device=self.device, check=check, baseline=baseline,
            params={
                "samples": self.samples, "tokens": self.tokens, "features": self.i,
                "outputs": self.o, "dtype": self.name, **params,
            },
            arms=[arm(name=arm_name, fn=run) for arm_name, run in arms.items()],
        )  # fmt: skip


def _dtypes(device):
    return ("fp32",) if device == "cpu" else ("fp32", "bf16")


def _close(found, exact, bound=1e-5):
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < bound, f"relative error {error:.1e}"


@benchmark
def ghost_dot(device):
    from shared_kernels.ops import ghost

    for dtype in _dtypes(device):
        layer = _Layer(device, dtype)
        y = layer.draw(layer.o, layer.i)

        def ours(layer=layer, y=y):
            return ghost.ghost_dot(layer.x, layer.d, y)

        def formed(layer=layer, y=y):
            return (layer.gradients() * y).sum((1, 2), dtype=torch.float32)

        def matmul(layer=layer, y=y):
            return ((layer.x @ y.T) * layer.d).sum((1, 2), dtype=torch.float32)

        def check(layer=layer, y=y, ours=ours):
            _close(ours()[:4], (layer.exact(4) * y.double()).sum((1, 2)))

        yield layer.workload(
            "ghost_dot", check, 2 * layer.rows * layer.i * layer.o, "vmap(grad)",
            {"vmap(grad)": formed, "matmul": matmul, "ghost_dot": ours},
        )  # fmt: skip


@benchmark
def ghost_dot_low_rank(device):
    from shared_kernels.ops import ghost

    for dtype in _dtypes(device):
        layer = _Layer(device, dtype)
        u, v = layer.draw(layer.o, RANK), layer.draw(layer.i, RANK)

        def ours(layer=layer, u=u, v=v):
            return ghost.ghost_dot_low_rank(layer.x, layer.d, u, v)

        def dense(layer=layer, u=u, v=v):
            return ghost.ghost_dot(layer.x, layer.d, u @ v.T)

        def matmul(layer=layer, u=u, v=v):
            return ((layer.x @ v) * (layer.d @ u)).sum((1, 2), dtype=torch.float32)

        def check(layer=layer, u=u, v=v, ours=ours):
            _close(ours()[:4], (layer.exact(4) * (u.double() @ v.double().T)).sum((1, 2)))

        yield layer.workload(
            "ghost_dot_low_rank", check, 2 * layer.rows * RANK * (layer.i + layer.o), "matmul",
            {"matmul": matmul, "ghost_dot": dense, "ghost_dot_low_rank": ours}, rank=RANK,
        )  # fmt: skip


@benchmark
def pairwise(device):
    from shared_kernels.ops import ghost

    for dtype in _dtypes(device):
        for tokens in (8, None):
            layer = _Layer(device, dtype, tokens)
            count, length = layer.samples, layer.tokens
            way = ghost.pairwise_way(count, length, count, length, layer.i, layer.o)

            def run(way, layer=layer):
                return ghost.pairwise_ghost(layer.x, layer.d, layer.x, layer.d, way=way)

            def formed(layer=layer):
                one, two = layer.gradients().flatten(1), layer.gradients().flatten(1)
                return one @ two.T

            def check(layer=layer, run=run):
                exact = layer.exact(4).flatten(1)
                for way in ("gram", "product"):
                    _close(run(way)[:4, :4], exact @ exact.T, 3e-5)

            products = 2 * count**2 * layer.i * layer.o
            flops = {
                "gram": 2 * layer.rows**2 * (layer.i + layer.o),
                "product": 4 * layer.rows * layer.i * layer.o + products,
            }[way]
            yield layer.workload(
                f"pairwise, {length} tokens", check, flops, "vmap(grad)",
                {"vmap(grad)": formed, "gram": functools.partial(run, "gram"),
                 "product": functools.partial(run, "product")}, way=way,
            )  # fmt: skip


@benchmark
def kron_cov(device):
    from shared_kernels.ops import ghost

    for dtype in _dtypes(device):
        layer = _Layer(device, dtype)
        a, s = (torch.zeros(n, n, device=device) for n in (layer.i, layer.o))
        weights = torch.rand(layer.samples, layer.tokens, device=device)

        def ours(layer=layer, a=a, s=s, weights=None):
            ghost.kron_cov_(a, s, layer.x, layer.d, weights=weights)

        def matmul(layer=layer, a=a, s=s):
            for m, out in ((layer.x, a), (layer.d, s)):
                rows = m.flatten(0, 1).float()
                out.addmm_(rows.T, rows)

        def check(layer=layer, a=a, s=s, ours=ours, weights=weights):
            for w in (None, weights):
                a.zero_()
                s.zero_()
                ours(weights=w)
                for m, out in ((layer.x, a), (layer.d, s)):
                    rows = m.flatten(0, 1).double()
                    left = rows if w is None else rows * w.double().flatten()[:, None]
                    _close(out, left.T @ rows)

        yield layer.workload(
            "kron_cov", check, layer.rows * (layer.i**2 + layer.o**2), "matmul",
            {"matmul": matmul, "kron_cov_": ours,
             "kron_cov_, weighted": functools.partial(ours, weights=weights)},
        )  # fmt: skip


@benchmark
def kron_sketch(device):
    from shared_kernels.ops import ghost
    from shared_kernels.ops.ghost import reference

    for dtype in _dtypes(device):
        layer = _Layer(device, dtype)
        ranks = (64, 64)
        left, right = (
            reference.signs(n, k, 0, side, layer.x.device, layer.dtype)
            for n, k, side in ((layer.o, ranks[0], 0), (layer.i, ranks[1], 1))
        )

        def ours(layer=layer, ranks=ranks):
            return ghost.kron_sketch(layer.x, layer.d, 0, *ranks)

        def matmul(layer=layer, left=left, right=right):
            return (layer.d @ left).mT @ (layer.x @ right)

        def check(layer=layer, left=left, right=right, ours=ours):
            exact = left.double().T @ layer.exact(4) @ right.double() / 64
            _close(ours()[:4], exact.flatten(1))

        projections = layer.i * ranks[1] + layer.o * ranks[0]
        yield layer.workload(
            "kron_sketch", check, 2 * layer.rows * (projections + ranks[0] * ranks[1]), "matmul",
            {"matmul": matmul, "kron_sketch": ours}, ranks=list(ranks),
        )  # fmt: skip
