"""Entropy of a head at every token of a prompt, against ways that make its logits.

Heads of Qwen2.5-0.5B and 7B (d = 896 and 3584, 151,936 tokens) on 8192 tokens, and 131,072 tokens
of the small one, whose float32 logits would be 80 GB.

- ``log-softmax`` makes all logits and takes 128 rows of them at a time, as ``entropy_from_logits``
  of trl 1.16 does.
- ``compiled`` makes and takes 1024 rows at a time, in float32, compiled by torch.
- ``matmul`` only makes the logits.

On a CPU the head of SmolLM2 (d = 576, 49,152 tokens), in float32.
"""

from __future__ import annotations

import torch
from shared_kernels.bench import Arm, Workload, benchmark

VOCABULARY = 151936


@benchmark
def heads(device):
    if device != "cpu":
        for width in (896, 3584):
            yield _workload(device, 8192, VOCABULARY, width, torch.bfloat16)


@benchmark
def long_prompt(device):
    if device != "cpu":
        yield _workload(device, 131072, VOCABULARY, 896, torch.bfloat16, whole=False)


@benchmark
def cpu(device):
    if device == "cpu":
        yield _workload(device, 2048, 49152, 576, torch.float32)


def _entropy(logprobs):
    return -(logprobs.exp() * logprobs).sum(-1)


def _chunk(hidden, weight):
    return _entropy(torch.log_softmax((hidden @ weight.T).float(), -1))


def _workload(device, tokens, vocabulary, width, dtype, *, whole=True):
    from shared_kernels.ops.lm_head import linear_entropy

    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device=device, dtype=dtype)
    weight *= width**-0.5
    chunk = torch.compile(_chunk) if device != "cpu" else _chunk

    def all_logits():
        logits = hidden @ weight.T
        return torch.cat([_entropy(torch.log_softmax(part, -1)) for part in logits.split(128)])

    def compiled():
        return torch.cat([chunk(part, weight) for part in hidden.split(1024)])

    def check():
        rows = slice(0, 256)
        z = hidden[rows].double() @ weight.double().T
        expected = _entropy(torch.log_softmax(z, -1))
        found = linear_entropy(hidden, weight).entropy[rows].double()
        assert (found - expected).abs().max() < (1e-3 if dtype == torch.bfloat16 else 2e-5)

    counts = {
        "flops": 2 * tokens * vocabulary * width,
        "flops_dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
        "bytes": hidden.nbytes + weight.nbytes,
    }
    arms = [Arm(name="compiled", fn=compiled, **counts)]
    if whole:
        arms = [
            Arm(name="log-softmax", fn=all_logits, **counts),
            *arms,
            Arm(name="matmul", fn=lambda: hidden @ weight.T, **counts),
        ]
    if device == "cpu":
        arms = [arm for arm in arms if arm.name != "compiled"]
    arms.append(Arm(name="ours", fn=lambda: linear_entropy(hidden, weight), **counts))
    return Workload(
        name=f"linear_entropy/{tokens} tokens, d={width}, V={vocabulary}",
        params={"tokens": tokens, "width": width, "vocabulary": vocabulary, "dtype": str(dtype)},
        device=device,
        check=check,
        baseline=arms[0].name,
        arms=arms,
    )
