"""Float64 sums of what passes through a mixture of experts, against torch's own operations.

On a GPU a layer of Qwen3-30B-A3B in bfloat16: 16,384 tokens of 2048 channels, eight of 128 experts
each, so that 131,072 rows are sorted by expert. ``torch`` makes float64 copies and sums them with
``torch.segment_reduce``, or a column at a time; on a CPU it sums expert by expert.

- ``segments`` sums experts' outputs, and absolute values of their activations.
- ``assignments`` sums outputs, weights, shares and norms, and finds the largest norm.
- ``norms`` sums absolute values of what a norm gives and squares of what it takes.
- ``stream`` sums hidden states.

On a CPU 4096 tokens of 256 channels and 64 experts, in float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from shared_kernels.bench import Arm, Workload, benchmark

COPY_BYTES = 256 << 20


class _Inputs:
    """Rows of tokens, and rows of assignments sorted by expert."""

    def __init__(self, device):
        small = device == "cpu"
        self.tokens, self.experts = (4096, 64) if small else (16384, 128)
        self.width, self.inner = (256, 128) if small else (2048, 768)
        self.dtype = torch.float32 if small else torch.bfloat16
        self.device, self.rows = device, 8 * self.tokens
        self.generator = torch.Generator(device).manual_seed(0)
        # some experts have several times as many rows as others
        share = 0.1 + torch.rand(self.experts, generator=self.generator, device=device)
        expert = torch.multinomial(share, self.rows, True, generator=self.generator)
        self.expert, _ = expert.sort()
        self.counts = torch.bincount(expert, minlength=self.experts)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def workload(self, name, check, plain, ours, read, written):
        bytes_ = sum(x.nbytes for x in read) + 8 * written
        return Workload(
            name=name,
            device=self.device,
            check=check,
            baseline="torch",
            arms=[
                Arm(name="torch", fn=plain, bytes=bytes_),
                Arm(name="ours", fn=ours, bytes=bytes_),
            ],
            params={
                "tokens": self.tokens, "rows": len(read[0]), "experts": self.experts,
                "width": read[0].shape[1], "dtype": str(self.dtype),
            },
        )  # fmt: skip


def segment_sums_of_torch(x, counts, absolute=False):
    out = x.new_zeros(len(counts), x.shape[1], dtype=torch.float64)
    if not x.is_cuda:
        for row, (low, high) in zip(out, pairwise([0, *counts.cumsum(0).tolist()]), strict=True):
            part = x[low:high].abs() if absolute else x[low:high]
            torch.sum(part, 0, dtype=torch.float64, out=row)
        return out
    width = max(1, COPY_BYTES // (8 * len(x)))
    for at in range(0, x.shape[1], width):
        part = x[:, at : at + width].double()
        part = part.abs() if absolute else part
        out[:, at : at + width] = torch.segment_reduce(part, "sum", lengths=counts, unsafe=True)
    return out


def _close(found, wanted, bound=1e-9):
    for a, b in zip(found, wanted, strict=True):
        assert ((a - b).abs() <= bound * b.abs().max()).all()


@benchmark
def segments(device):
    from shared_kernels.ops.segments import segment_sums

    inputs = _Inputs(device)
    for width, kind in ((inputs.width, "sum"), (inputs.inner, "abs")):
        x = inputs.draw(inputs.rows, width)

        def plain(x=x, kind=kind):
            return segment_sums_of_torch(x, inputs.counts, kind == "abs")

        def ours(x=x, kind=kind):
            return segment_sums(x, inputs.counts, kind=kind)

        yield inputs.workload(
            f"segments/{kind}, W={width}",
            lambda plain=plain, ours=ours: _close([ours()], [plain()]),
            plain, ours, [x], inputs.experts * width,
        )  # fmt: skip


@benchmark
def assignments(device):
    from shared_kernels.ops.segments import assignment_sums

    inputs = _Inputs(device)
    output = inputs.draw(inputs.rows, inputs.width)
    weight = torch.rand(inputs.rows, generator=inputs.generator, device=device).to(inputs.dtype)
    share = weight.double()

    def plain():
        norm = torch.linalg.vector_norm(output.float(), dim=-1).double()
        w = weight.double()
        columns = torch.stack([torch.ones_like(w), w, share, norm, w * norm], -1)
        peak = norm.new_zeros(inputs.experts).scatter_reduce(0, inputs.expert, norm, "amax")
        sums = segment_sums_of_torch(columns, inputs.counts)
        return segment_sums_of_torch(output, inputs.counts), torch.cat([sums, peak[:, None]], -1)

    def ours():
        return assignment_sums(output, weight, share, inputs.counts)

    yield inputs.workload(
        f"assignments/W={inputs.width}", lambda: _close(ours(), plain(), 1e-6), plain, ours,
        [output, weight, share], inputs.experts * (inputs.width + 6),
    )  # fmt: skip


@benchmark
def norms(device):
    from shared_kernels.ops.segments import norm_sums

    inputs = _Inputs(device)
    x, y = inputs.draw(inputs.tokens, inputs.width), inputs.draw(inputs.tokens, inputs.width)

    def plain():
        square = x.float().square().sum(0, dtype=torch.float64)
        return square, y.abs().sum(0, dtype=torch.float64)

    def ours():
        return norm_sums(x, y)

    yield inputs.workload(
        f"norms/W={inputs.width}", lambda: _close(ours(), plain()), plain, ours, [x, y],
        2 * inputs.width,
    )  # fmt: skip


@benchmark
def stream(device):
    from shared_kernels.ops.segments import segment_sums

    inputs = _Inputs(device)
    x = inputs.draw(inputs.tokens, inputs.width)

    def plain():
        return x.sum(0, keepdim=True, dtype=torch.float64)

    def ours():
        return segment_sums(x)

    yield inputs.workload(
        f"stream/W={inputs.width}", lambda: _close([ours()], [plain()]), plain, ours, [x],
        inputs.width,
    )  # fmt: skip
