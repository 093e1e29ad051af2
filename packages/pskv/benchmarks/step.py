"""One step of a search: 512 candidates that differ from a parent in one token, on one prefix.

Llama-3-8B's shape in bfloat16 with random weights: time and memory say something, scores do not.
Suffix 20 tokens, tail 5, target 20. `pskv.bench` says what the peers do; each runs at the batch
that a trial found fastest for it.
"""

from __future__ import annotations

import dataclasses

import torch
from shared_kernels.bench import Workload, benchmark

ROWS, SUFFIX, TAIL, TARGET = 512, 20, 5, 20
LAYERS = 32


def llama(device, layers=LAYERS):
    """Make Llama-3-8B's shape with random weights."""
    return _random(
        device, vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip


def _random(device, **shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(default)
    return model


def _steps(device, prefix, peers, few):
    if device == "cpu":
        return
    from pskv import PrefixScorer
    from pskv.bench import StepProblem, step_workload

    scorer = PrefixScorer(llama(device), backend="fused")
    problem = StepProblem(
        scorer, prefix=prefix, rows=ROWS, suffix=SUFFIX, tail=TAIL, target=TARGET,
        batches=(512, 256, 128, 64),
    )  # fmt: skip
    for _ in range(3):
        problem.ours()
    yield step_workload(problem, peers, name=f"step/llama-3-8b, {prefix} tokens", few=few)


@benchmark
def prefix_256(device):
    """The step behind a short prefix."""
    yield from _steps(device, 256, ("no cache", "replicate", "layerwise"), (16, 32))


@benchmark
def prefix_1024(device):
    """The step behind a middling one."""
    yield from _steps(device, 1024, ("no cache", "replicate", "layerwise"), (16,))


@benchmark
def prefix_4096(device):
    """The step behind a long one, where no peer can pass whole rows in any time."""
    yield from _steps(device, 4096, ("replicate", "layerwise"), ())


@benchmark
def rows_that_fit(device):
    """How many tokens a pass could take at a long prefix, relative to a short one."""
    if device == "cpu":
        return
    from pskv import PrefixScorer
    from pskv.bench import StepProblem
    from shared_kernels.bench import Arm

    model = llama(device)
    fits, problems = {}, {}
    for prefix in (64, 8192):
        scorer = PrefixScorer(model, backend="fused")
        problems[prefix] = StepProblem(
            scorer, prefix=prefix, rows=ROWS, suffix=SUFFIX, tail=TAIL, target=TARGET
        )
        torch.cuda.empty_cache()
        problems[prefix].ours()
        fits[str(prefix)] = scorer._passes.micro.fits
    yield Workload(
        name="fits/llama-3-8b", baseline="64 tokens", check=lambda: None, device=device,
        clock="wall", params={"tokens_that_fit": fits, "rows": ROWS},
        arms=[Arm(name=f"{length} tokens", fn=p.ours) for length, p in problems.items()],
    )  # fmt: skip


@benchmark
def full_width(device):
    """Extra peak memory against a replicated cache of all rows at once."""
    if device == "cpu":
        return
    from pskv import PrefixScorer
    from pskv.bench import StepProblem
    from shared_kernels.bench import Arm

    # 32 layers' copies are 69 GiB, which fit beside the weights on the largest cards only
    layers = LAYERS if torch.cuda.get_device_properties(0).total_memory > 120e9 else 12
    model = llama(device, layers)
    sizes = {"prefix": 1024, "rows": ROWS, "suffix": SUFFIX, "tail": TAIL, "target": TARGET}
    problems = [
        StepProblem(PrefixScorer(model, backend="fused", micro_batch=tokens), **sizes)
        for tokens in ("auto", 4096)
    ]
    problems[0].ours()
    yield Workload(
        name="memory/llama-3-8b, 1024 tokens, all rows at once", baseline="replicate",
        check=problems[0].check, device=device, clock="wall",
        params={"layers": layers, **sizes},
        arms=[
            Arm(name="replicate", fn=lambda: problems[0].peer("replicate", ROWS)),
            Arm(name="pskv", fn=problems[0].ours),
            Arm(name="pskv, 4096 tokens a pass", fn=problems[1].ours),
        ],
    )  # fmt: skip


@benchmark
def small(device):
    """A short prefix and few rows: nothing may be slower than the fastest peer."""
    from pskv import PrefixScorer
    from pskv.bench import StepProblem, step_workload

    if device == "cpu":
        from tenfold.assets import smollm2
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    else:
        model = llama(device)
    scorer = PrefixScorer(model, backend="auto")
    sizes = {"suffix": SUFFIX, "tail": TAIL, "target": TARGET}
    problem = StepProblem(scorer, prefix=16, rows=8, batches=(8,), **sizes)
    # every way is tried first
    for _ in range(40):
        problem.propose()
        problem.ours()
    yield step_workload(problem, name="small/16 tokens, 8 rows")


@benchmark
def small_model(device):
    """SmolLM2-135M's shape, for which launching kernels takes longer than they run."""
    if device == "cpu":
        return
    from pskv import PrefixScorer
    from pskv.bench import StepProblem, step_workload
    from shared_kernels.bench import Arm

    model = _random(
        device, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    sizes = {"suffix": SUFFIX, "tail": TAIL, "target": TARGET}
    for prefix, rows in ((256, 64), (256, ROWS), (1024, 64)):
        problem, plain = (
            StepProblem(
                PrefixScorer(model, backend="fused", cuda_graphs=graphs), prefix=prefix, rows=rows,
                **sizes,
            )
            for graphs in (True, False)
        )  # fmt: skip
        for _ in range(20):
            problem.propose()
            problem.ours()
        workload = step_workload(
            problem, ("replicate", "layerwise"), name=f"step/135M, {prefix} tokens, {rows} rows"
        )
        arm = Arm(name="pskv, no graphs", fn=plain.ours, setup=plain.propose)
        yield dataclasses.replace(workload, arms=[*workload.arms, arm])


@benchmark
def smollm2_cpu(device):
    """A real model on a CPU, against passes that expand the prefix and join it."""
    if device != "cpu":
        return
    from pskv import PrefixScorer
    from pskv.bench import StepProblem, step_workload
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    scorer = PrefixScorer(model, backend="split")
    for prefix, rows in ((256, 16), (1024, 16), (4096, 6)):
        problem = StepProblem(
            scorer, prefix=prefix, rows=rows, suffix=12, tail=4, target=8, batches=(rows,)
        )
        problem.ours()
        yield step_workload(
            problem, ("replicate", "layerwise"), name=f"step/SmolLM2-135M, {prefix} tokens"
        )
        problem.prefix.close()
