"""Attention of packed rows over one prefix, against dense calls that need as many operations.

512 rows of 45 tokens, 32 query heads on 8 key heads of 128 dimensions, as Llama-3-8B has. The dense
arms are one call of the same queries over as many keys as make its operations equal: they neither
mask anything nor read keys of the rows' own, so they say what the machine can do rather than do the
work. ``rows`` is "apart" if each row computes all of its tokens, and "of one parent" if it starts
at the token in which it differs from the first row, as the candidates of a coordinate search do.
Every arm makes four calls in a row, as a model's layers do. On a GPU all arms but ``split`` replay
them from a CUDA graph: behind a short prefix a call is over before a slow host has launched the
next, and what is measured is the kernel.
"""

from __future__ import annotations

import functools

import torch
from shared_kernels.bench import Arm, Workload, benchmark

ROWS, OWN, SUFFIX = 512, 45, 20
HEADS, GROUP, DIM = 8, 4, 128
LAYERS = 4


@benchmark
def hopper(device):
    if device != "cpu":
        for prefix in (256, 1024, 4096, 32768):
            for apart in (True, False):
                yield _workload(device, prefix, apart, torch.bfloat16)


@benchmark
def cpu(device):
    if device == "cpu":
        for prefix in (256, 1024):
            yield _workload(device, prefix, True, torch.float32, rows=16)


class _Problem:
    def __init__(self, device, prefix, apart, dtype, rows):
        from shared_kernels.ops.prefix_attention import PrefixLayout, shared_prefix_attention

        self.attend = shared_prefix_attention
        changes = [0 if apart else SUFFIX * row // rows for row in range(rows)]
        self.lengths = [OWN - change for change in changes]
        self.before = changes
        self.layout = PrefixLayout.build(
            self.lengths, shared=(0, prefix), ancestors=[[(0, change)] for change in changes]
        )
        generator = torch.Generator().manual_seed(0)
        total = self.layout.queries
        shapes = [(total, HEADS * GROUP), *[(total, HEADS)] * 2, *[(prefix, HEADS)] * 2]
        self.tensors = [
            torch.randn(*shape, DIM, generator=generator).to(device, dtype) for shape in shapes
        ]
        seen = sum(
            n * (prefix + change) + n * (n + 1) // 2
            for n, change in zip(self.lengths, changes, strict=True)
        )
        self.flops = 4 * seen * HEADS * GROUP * DIM
        keys = -(-seen // total)
        q = self.tensors[0].view(total, HEADS, GROUP, DIM).transpose(0, 1)
        self.dense = [q.reshape(1, HEADS, total * GROUP, DIM)]
        self.dense += [torch.randn(1, HEADS, keys, DIM, device=device, dtype=dtype)] * 2
        self.bytes = sum(t.nbytes for t in self.tensors) + self.tensors[0].nbytes

    def run(self, impl):
        return self.attend(*self.tensors, self.layout, impl=impl)

    def dense_call(self, backend):
        from torch.nn.attention import sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*self.dense)

    def check(self):
        """Compare some rows with float64 attention over a copy of what they see."""
        q, k, v, shared_k, shared_v = self.tensors
        out, _ = self.run("auto")
        split, _ = self.run("split")
        starts = self.layout.rows[:, 0].tolist()
        for row in (0, 1, len(self.lengths) // 2, len(self.lengths) - 1):
            own = slice(starts[row], starts[row] + self.lengths[row])
            keys, values = (
                torch.cat([s, x[: self.before[row]], x[own]]).repeat_interleave(GROUP, 1)
                for s, x in ((shared_k, k), (shared_v, v))
            )
            logits = torch.einsum("mhd,nhd->hmn", q[own].double(), keys.double()) * DIM**-0.5
            total = keys.shape[0]
            index = torch.arange(total, device=q.device)
            hidden = index > index[total - self.lengths[row] :, None]
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            expected = torch.einsum("hmn,nhd->mhd", weights, values.double())
            bound = {2: 8e-3, 4: 4e-6}[q.element_size()] * expected.abs().max()
            for found in (out, split):
                assert (found[own].double() - expected).abs().max() <= bound


def _recorded(fn):
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def _workload(device, prefix, apart, dtype, rows=ROWS):
    problem = _Problem(device, prefix, apart, dtype, rows)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]

    def arm(label, fn):
        def calls():
            return [fn() for _ in range(LAYERS)]

        return Arm(
            name=label,
            fn=calls if device == "cpu" or label == "split" else _recorded(calls),
            flops=LAYERS * problem.flops,
            flops_dtype=name,
            bytes=LAYERS * problem.bytes,
        )

    ours = [arm("split", functools.partial(problem.run, "split"))]
    if device != "cpu":
        ours.insert(0, arm("triton", functools.partial(problem.run, "triton")))
        backends = {"dense, cuDNN": "CUDNN_ATTENTION", "dense, flash": "FLASH_ATTENTION"}
    else:
        backends = {"dense, flash": "FLASH_ATTENTION"}
    from torch.nn.attention import SDPBackend

    dense = [
        arm(label, functools.partial(problem.dense_call, getattr(SDPBackend, backend)))
        for label, backend in backends.items()
    ]
    return Workload(
        name=f"prefix_attention/{name}, {prefix} tokens, {'apart' if apart else 'of one parent'}",
        params={
            "prefix": prefix,
            "rows": "apart" if apart else "of one parent",
            "queries": problem.layout.queries,
            "layers": LAYERS,
            "dtype": name,
        },
        device=device,
        check=problem.check,
        baseline=dense[0].name,
        arms=[*dense, *ours],
    )
