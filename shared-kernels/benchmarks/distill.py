"""Distillation of a linear head with its gradients, against ways that make all logits.

On a GPU the heads of Qwen3 (151,936 tokens, student d = 1536, teacher d = 2048) on 8192 and 32,768
tokens in bfloat16:

- ``gemms`` only makes the four products, chunk by chunk as ours does: the floor.
- ``naive`` is plain autograd with float32 losses of all logits at once, where those fit.
- ``liger`` is Liger-Kernel's fused linear JSD at beta 0, which is KL alone, where it is installed.

``precision`` has a teacher close to its student, at a KL of 0.005 nats; parameters of its result
hold relative errors of gradients against float64: of ours, of autograd from logits in bfloat16, and
of rounding the exact ones to bfloat16.

``heads`` has a module for multi-token prediction beside the backbone, in one call and in two, and
``sparse`` 64 cached tokens of a teacher instead of the teacher.

On a CPU a vocabulary of 49,152 tokens, 2048 tokens, d = 256 and 320, in float32.
"""

from __future__ import annotations

import importlib.util

import torch
from shared_kernels.bench import Arm, Workload, benchmark
from torch.nn.functional import cross_entropy, kl_div, log_softmax

VOCABULARY = 151936
KD_WEIGHT = 0.75


@benchmark
def dense(device):
    if device == "cpu":
        yield _dense(device, 2048, 49152, 256, 320, torch.float32)
    else:
        for tokens in (8192, 32768):
            yield _dense(device, tokens, VOCABULARY, 1536, 2048, torch.bfloat16)


@benchmark
def precision(device):
    if device == "cpu":
        yield _precision(device, 128, 4096, 256)
    else:
        yield _precision(device, 1024, VOCABULARY, 1536)


@benchmark
def heads(device):
    if device == "cpu":
        yield _heads(device, 1024, 49152, 256, 320, torch.float32)
    else:
        yield _heads(device, 16384, VOCABULARY, 1536, 2048, torch.bfloat16)


@benchmark
def sparse(device):
    if device == "cpu":
        yield _sparse(device, 1024, 49152, 256, torch.float32)
    else:
        yield _sparse(device, 8192, VOCABULARY, 1536, torch.bfloat16)


class _Inputs:
    """States and heads of a student and a teacher that agree in part."""

    def __init__(self, device, tokens, vocabulary, width, teacher_width, dtype):
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.hidden = draw(tokens, width).requires_grad_()
        self.weight = (draw(vocabulary, width) * width**-0.5).requires_grad_()
        self.teacher_hidden = draw(tokens, teacher_width)
        self.teacher_weight = draw(vocabulary, teacher_width) * teacher_width**-0.5
        self.labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
        self.shapes = {
            "tokens": tokens, "vocabulary": vocabulary, "width": width,
            "teacher_width": teacher_width, "dtype": str(dtype),
        }  # fmt: skip

    def all(self):
        return self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def naive_loss(hidden, weight, teacher_hidden, teacher_weight, labels):
    s = hidden @ weight.T
    with torch.no_grad():
        logq = log_softmax((teacher_hidden @ teacher_weight.T).float(), -1)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    kl = kl_div(log_softmax(s, -1), logq.to(s.dtype), log_target=True, reduction="batchmean")
    return (1 - KD_WEIGHT) * cross_entropy(s, labels) + KD_WEIGHT * kl


def _bare_products(inputs, rows):
    """The four products of each chunk, into buffers as ours has them."""
    hidden, weight, teacher_hidden, teacher_weight, _ = (x.detach() for x in inputs.all())
    narrow = {} if hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
    count, vocabulary = len(hidden), len(weight)
    student = torch.empty(rows, vocabulary, device=hidden.device)
    teacher = torch.empty_like(student)
    slope = torch.randn(rows, vocabulary, device=hidden.device, dtype=hidden.dtype)
    d_weight = torch.zeros(weight.shape, device=hidden.device)

    def run():
        for low in range(0, count, rows):
            states = hidden[low : low + rows]
            size = len(states)
            torch.mm(states, weight.T, **narrow, out=student[:size])
            torch.mm(
                teacher_hidden[low : low + rows], teacher_weight.T, **narrow, out=teacher[:size]
            )
            torch.mm(slope[:size], weight, **narrow)
            torch.addmm(d_weight, slope[:size].T, states, **narrow, out=d_weight)

    return run


def _liger(inputs):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.0)
    hidden, weight, teacher_hidden, teacher_weight, _ = inputs.all()
    return lambda: inputs.gradients(module(hidden, weight, teacher_hidden, teacher_weight, None))


def _relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _dense(device, tokens, vocabulary, width, teacher_width, dtype):
    from shared_kernels.ops.distill import chunks, fused_linear_distillation

    inputs = _Inputs(device, tokens, vocabulary, width, teacher_width, dtype)
    rows = chunks.chunk_rows(0, vocabulary, dtype, inputs.hidden.device)

    def ours():
        found = fused_linear_distillation(*inputs.all(), kd_weight=KD_WEIGHT)
        return found.loss.detach(), inputs.gradients(found.loss)

    def check():
        part = slice(0, 64)
        own = [x.detach()[part] if len(x) == tokens else x.detach() for x in inputs.all()]
        wide = [x.double() if x.is_floating_point() else x for x in own]
        pairs = []
        for given, function in ((own, _loss_of_ours), (wide, naive_loss)):
            leaves = [x.detach().requires_grad_() for x in given[:2]]
            loss = function(*leaves, *given[2:])
            pairs.append(torch.autograd.grad(loss, leaves))
        bound = 1e-5 if dtype == torch.float32 else 3e-3
        assert all(_relative(a, b) < bound for a, b in zip(*pairs, strict=True))

    counts = _counts(inputs, 3 * width + teacher_width)
    arms = [Arm(name="gemms", fn=_bare_products(inputs, rows), **counts)]
    # six blocks of float32 logits
    if device == "cpu" or 6 * 4 * tokens * vocabulary < 60e9:
        naive = Arm(name="naive", fn=lambda: inputs.gradients(naive_loss(*inputs.all())), **counts)
        arms = [naive, *arms]
    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        arms.append(Arm(name="liger", fn=_liger(inputs), **counts))
    arms.append(Arm(name="ours", fn=ours, **counts))
    return Workload(
        name=f"distill/{tokens} tokens, V={vocabulary}",
        params=inputs.shapes | {"chunk": rows},
        device=device,
        check=check,
        baseline=arms[0].name,
        arms=arms,
    )


def _precision(device, tokens, vocabulary, width):
    inputs = _Inputs(device, tokens, vocabulary, width, 8, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(1)
    hidden, labels = inputs.hidden, inputs.labels
    weight = (2 * inputs.weight.detach()).requires_grad_()
    noise = torch.randn(hidden.shape, generator=generator, device=device)
    near = (hidden.detach() + 0.05 * noise).bfloat16()
    leaves = [hidden, weight]

    def ours():
        found = _distil(*leaves, near, weight.detach(), labels, kd_weight=1.0)
        return torch.autograd.grad(found.loss, leaves)

    def kl_of(student, head):
        s = student @ head.T
        with torch.no_grad():
            t = near.to(head.dtype) @ head.T
        wider = torch.promote_types(s.dtype, torch.float32)
        p, q = (log_softmax(x, -1, dtype=wider) for x in (s, t))
        return kl_div(p, q, log_target=True, reduction="batchmean")

    def narrow():
        return torch.autograd.grad(kl_of(*leaves), leaves)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    kl = kl_of(*wide)
    exact = torch.autograd.grad(kl, wide)
    names = ("hidden", "weight")
    ways = {
        "bfloat16 logits": narrow,
        "ours": ours,
        "rounding": lambda: [x.bfloat16() for x in exact],
    }
    errors = {
        arm: {n: _relative(a, b) for n, a, b in zip(names, run(), exact, strict=True)}
        for arm, run in ways.items()
    }
    params = inputs.shapes | {"teacher_width": width, "kl": kl.item(), "gradient errors": errors}
    counts = _counts(inputs, 4 * width)
    return Workload(
        name=f"distill-precision/{tokens} tokens, V={vocabulary}",
        params=params,
        device=device,
        check=lambda: max(errors["ours"].values()) < 5e-3,
        baseline="bfloat16 logits",
        arms=[
            Arm(name="bfloat16 logits", fn=narrow, **counts),
            Arm(name="ours", fn=ours, **counts),
        ],
    )


def _loss_of_ours(*arguments):
    return _distil(*arguments, kd_weight=KD_WEIGHT).loss


def _distil(*arguments, **options):
    from shared_kernels.ops.distill import fused_linear_distillation

    return fused_linear_distillation(*arguments, **options)


def _counts(inputs, widths):
    """FLOPs of products whose inner or outer sizes beside tokens and vocabulary add to widths."""
    shapes = inputs.shapes
    return {
        "flops": 2 * shapes["tokens"] * shapes["vocabulary"] * widths,
        "flops_dtype": "bf16" if inputs.hidden.dtype == torch.bfloat16 else "fp32",
        "bytes": sum(x.nbytes for x in inputs.all()) + inputs.hidden.nbytes + inputs.weight.nbytes,
    }


def _heads(device, tokens, vocabulary, width, teacher_width, dtype):
    from shared_kernels.ops.distill import fused_linear_distillation_heads

    inputs = _Inputs(device, tokens, vocabulary, width, teacher_width, dtype)
    states = torch.randn_like(inputs.hidden).requires_grad_()
    rows = torch.arange(tokens, device=device)
    shifted = torch.where(rows < tokens - 1, rows + 1, -1)
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs.all()
    leaves = (hidden, states, weight)

    def call(parts):
        picked = [(hidden, rows, 1.0), (states, shifted, 0.3)]
        chosen = [picked[part] for part in parts]
        return fused_linear_distillation_heads(
            [x for x, _, _ in chosen],
            weight,
            teacher_hidden,
            teacher_weight,
            [labels] * len(chosen),
            rows=[x for _, x, _ in chosen],
            kd_weight=KD_WEIGHT,
            head_weights=[x for _, _, x in chosen],
        ).loss

    def two():
        first = torch.autograd.grad(call([0]), (hidden, weight))
        second = torch.autograd.grad(call([1]), (states, weight))
        return first[0], second[0], first[1] + second[1]

    def one():
        return torch.autograd.grad(call([0, 1]), leaves)

    def check():
        assert all(_relative(a, b) < 5e-3 for a, b in zip(one(), two(), strict=True))

    return Workload(
        name=f"distill-heads/{tokens} tokens, V={vocabulary}",
        params=inputs.shapes | {"heads": 2},
        device=device,
        check=check,
        baseline="two calls",
        arms=[
            Arm(name="two calls", fn=two, **_counts(inputs, 6 * width + 2 * teacher_width)),
            Arm(name="one call", fn=one, **_counts(inputs, 6 * width + teacher_width)),
        ],
    )


def _sparse(device, tokens, vocabulary, width, dtype, known=64):
    from shared_kernels.ops.distill import sparse_distillation

    inputs = _Inputs(device, tokens, vocabulary, width, 8, dtype)
    generator = torch.Generator(device).manual_seed(1)
    # distinct tokens: one of each stripe of the vocabulary
    stripe = vocabulary // known
    offsets = torch.randint(0, stripe, (tokens, known), generator=generator, device=device)
    indices = (offsets + stripe * torch.arange(known, device=device)).int()
    logits = 3 * torch.randn(tokens, known, generator=generator, device=device)
    log_probs = log_softmax(logits, -1) - 0.1

    def loss_of(hidden, weight, labels):
        return sparse_distillation(
            hidden, weight, indices[: len(hidden)], log_probs[: len(hidden)], labels,
            kd_weight=KD_WEIGHT,
        ).loss  # fmt: skip

    def dense_loss(hidden, weight, labels):
        """The cached law as a row of the vocabulary, its rest spread as the student's is."""
        s = hidden @ weight.T
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        logp = log_softmax(s, -1)
        token = indices[: len(hidden)].long()
        q = log_probs[: len(hidden)].to(s.dtype).exp()
        off = torch.zeros_like(s, dtype=torch.bool).scatter_(1, token, True).logical_not_()
        rest = 1 - q.sum(-1)
        log_rest = torch.where(off, logp, float("-inf")).logsumexp(-1)
        cross = -torch.zeros_like(s).scatter_(1, token, q).mul(logp).sum(-1) - rest * log_rest
        return (1 - KD_WEIGHT) * cross_entropy(s, labels) + KD_WEIGHT * cross.mean()

    def arm(function):
        return lambda: inputs.gradients(function(inputs.hidden, inputs.weight, inputs.labels))

    def check():
        given = [inputs.hidden[:64].detach(), inputs.weight.detach()]
        pairs = []
        for dtype_, function in ((dtype, loss_of), (torch.float64, dense_loss)):
            leaves = [x.to(dtype_).requires_grad_() for x in given]
            pairs.append(torch.autograd.grad(function(*leaves, inputs.labels[:64]), leaves))
        bound = 1e-5 if dtype == torch.float32 else 3e-3
        assert all(_relative(a, b) < bound for a, b in zip(*pairs, strict=True))

    def language_model(hidden, weight, labels):
        s = hidden @ weight.T
        return cross_entropy(s.to(torch.promote_types(s.dtype, torch.float32)), labels)

    counts = _counts(inputs, 3 * width)
    return Workload(
        name=f"distill-sparse/{tokens} tokens, V={vocabulary}, K={known}",
        params=inputs.shapes | {"known": known},
        device=device,
        check=check,
        baseline="dense rows",
        arms=[
            Arm(name="dense rows", fn=arm(dense_loss), **counts),
            Arm(name="cross-entropy alone", fn=arm(language_model), **counts),
            Arm(name="ours", fn=arm(loss_of), **counts),
        ],
    )
