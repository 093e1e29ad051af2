"""One training step: ours against MeZO's recipe, and streamed against resident.

The recipe is `zo2.reference.mezo_step`: perturb in place by +eps, forward, by -2 eps, forward, by
+eps, update, with torch's noise drawn anew in each of the four passes.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from shared_kernels.bench import Arm, Workload, benchmark

sys.path.insert(0, str(Path(__file__).parent))
import shapes

LR = 1e-7


@benchmark
def resident(device):
    """The whole model on the device, few tokens: where perturbing costs most."""
    for tokens in (128,) if device == "cpu" else (128, 512, 2048):
        yield _resident(device, tokens)
        gc.collect()


@benchmark
def streamed(device):
    """Every block from host memory, around the number of tokens T* that hides the transfer."""
    if device == "cpu":
        return
    for multiple in (0.25, 1.0, 2.0):
        yield _streamed(device, multiple)
        gc.collect()


@benchmark
def memory(device):
    """Host bytes against the weights', GPU peak against what `zo2.plan` foresaw."""
    if device == "cpu":
        return
    for tokens in (512, 2048):
        yield _memory(device, tokens)
        gc.collect()


def _engine(model, dist, offload):
    from zo2 import ZOConfig, prepare

    return prepare(model, ZOConfig(dist=dist), offload)


def _steps(engine, inputs, count=1):
    def run():
        for _ in range(count):
            engine.step(inputs, lr=LR)

    return run


def _gate(make, inputs, dist, offload, device):
    """A two-layer model of the same shape must measure what two full forwards measure."""
    from shared_kernels.random import derive_seed
    from zo2.reference import exact_step

    def check():
        torch.manual_seed(1)
        twin = make(2)
        torch.manual_seed(1)
        engine = _engine(make(2), dist, offload)
        loss = lambda m: m(**inputs).loss  # noqa: E731
        expected = exact_step(twin, loss, seed=derive_seed(0, 0), lr=LR, dist=dist)
        found = engine.estimate(inputs).loss
        mean = (expected.loss_plus + expected.loss_minus).mean() / 2
        torch.testing.assert_close(found, mean.float(), rtol=2e-3, atol=0)

    return check


def _resident(device, tokens):
    from zo2 import OffloadConfig
    from zo2.reference import mezo_step

    if device == "cpu":
        make, offload, layers = (lambda _: shapes.smollm2_135m()), None, 30
    else:
        make, layers = (lambda n: shapes.opt(n)), 40
        offload = OffloadConfig(gpu="136GiB", store="bf16", fold_every=1)
    inputs = shapes.batch(tokens, device=device)
    plain = make(layers)
    size = sum(p.numel() for p in plain.parameters())
    width = next(plain.parameters()).element_size()
    # Two forwards; weights read once, written once, and both perturbed copies written.
    counts = {
        "flops": 4 * size * tokens,
        "bytes": 4 * width * size,
        "flops_dtype": "fp32" if device == "cpu" else "bf16",
    }
    loss = lambda m: m(**inputs).loss  # noqa: E731
    arms = [Arm(name="MeZO recipe", fn=lambda: mezo_step(plain, loss, seed=1, lr=LR), **counts)]
    for dist in ("gaussian", "rademacher"):
        engine = _engine(make(layers), dist, offload)
        arms.append(Arm(name=f"zo2 {dist}", fn=_steps(engine, inputs), **counts))
    return Workload(
        name=f"resident/{tokens} tokens",
        params={
            "shape": "SmolLM2-135M" if device == "cpu" else "OPT-13B",
            "parameters": size,
            "dtype": str(plain.dtype),
            "tokens": tokens,
        },
        device=device,
        clock="wall",
        baseline="MeZO recipe",
        check=_gate(make, inputs, "gaussian", offload, device),
        arms=arms,
    )


def _streamed(device, multiple):
    from shared_kernels.offload import measure_bandwidth
    from zo2 import OffloadConfig, ZOConfig, plan

    layers, make = 8, shapes.opt
    rates = measure_bandwidth(device)
    # T* = bytes per parameter * FLOP/s / (4 * bytes/s): below it a step waits for the transfer.
    star = 2 * rates.gemm / (4 * rates.h2d)
    tokens = round(multiple * star / 2048) * 2048 or 2048
    inputs = shapes.batch(tokens, device=device)
    near = _engine(make(layers), "gaussian", OffloadConfig(gpu="120GiB", store="bf16x2"))
    size = sum(p.numel() for p in near.model.parameters())
    # Causal attention adds 2 d L FLOPs per token and layer to each forward.
    flops = 4 * size * tokens + 2 * layers * 2 * 5120 * 2048 * tokens
    arms, windows = [], {}
    for dist in ("gaussian", "rademacher"):
        # Folding often moves more bytes, folding seldom replays more updates: the plan weighs them.
        every = windows[dist] = plan(
            near.model.config, tokens=tokens, batch_size=len(inputs["input_ids"]), store="bf16x2",
            zo=ZOConfig(dist=dist), dtype=torch.bfloat16, device=device,
        ).best_fold_every  # fmt: skip
        from_host = OffloadConfig(store="bf16x2", fold_every=every)
        far = _engine(make(layers), dist, from_host)
        # The upper half of every weight goes up at every step; one in `every` blocks is folded:
        # its lower half goes up too, and both come down.
        weights = far.stats()["host_bytes"] // 4
        arms.append(
            Arm(
                name=f"streamed {dist}",
                fn=_steps(far, inputs, 4),
                flops=4 * flops,
                flops_dtype="bf16",
                h2d_bytes=4 * (weights * 2 + weights * 2 // every),
                d2h_bytes=4 * (weights * 4 // every),
            )
        )
    return Workload(
        name=f"streamed/{multiple:g} T*",
        params={
            "shape": f"OPT-13B, {layers} layers",
            "parameters": size,
            "tokens": tokens,
            "tokens_over_t_star": tokens / star,
            "store": "bf16x2",
            "fold_every": windows,
            "host_bytes": far.stats()["host_bytes"],
        },
        device=device,
        clock="wall",
        baseline="resident",
        check=_gate(make, shapes.batch(128, device=device), "gaussian", from_host, device),
        arms=[
            Arm(name="resident", fn=_steps(near, inputs, 4), flops=4 * flops, flops_dtype="bf16"),
            *arms,
        ],
    )


def _memory(device, tokens):
    import psutil
    from zo2 import OffloadConfig, ZOConfig, plan

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    offload, start = OffloadConfig(store="bf16x2", fold_every=8), torch.cuda.memory_allocated()
    inputs = shapes.batch(tokens, device=device)
    model = shapes.opt(16, hidden=4096, heads=32)
    rss = psutil.Process().memory_info().rss
    engine = _engine(model, "gaussian", offload)
    rss = psutil.Process().memory_info().rss - rss
    blocks = 4 * sum(p.numel for unit in engine._engine.plan.blocks for p in unit.params)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = _steps(engine, inputs)
    step()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - start
    rates = dict.fromkeys(("h2d", "d2h", "duplex", "d2d", "gemm", "rng"), 1.0)
    foreseen = plan(
        model.config, tokens=tokens, offload=offload, zo=ZOConfig(), bandwidth=rates, device=device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    ids = inputs["input_ids"]

    def evaluate():
        engine.evaluate(lambda m: m(ids, use_cache=False).logits)

    return Workload(
        name=f"memory/{tokens} tokens",
        params={
            "shape": "OPT-6.7B, 16 layers",
            "tokens": tokens,
            "store": "bf16x2",
            "block bytes": blocks,
            "host bytes": engine.stats()["host_bytes"],
            "host bytes over block bytes": engine.stats()["host_bytes"] / blocks,
            "growth of the resident set": rss,
            "planned GPU peak": foreseen.gpu_bytes,
            "measured GPU peak": peak,
            "measured over planned": peak / foreseen.gpu_bytes,
        },
        device=device,
        clock="wall",
        baseline="evaluation",
        check=lambda: bool(torch.isfinite(engine.estimate(inputs).loss)),
        arms=[Arm(name="evaluation", fn=evaluate), Arm(name="step", fn=step)],
    )
