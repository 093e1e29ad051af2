"""ACDC on SmolLM2-135M-Instruct, seconds for each removal that is tried, in float32.

``one run each`` is what a sequential search takes at least: the plain forward pass of transformers
on the same pairs, without any hook, and the metric. ``one patched run each`` is the sequential
search as it is defined, with this package's patched run. Both are timed on some removals, the
search on all of them.
"""

from __future__ import annotations

import time

import torch
from shared_kernels.bench import Arm, Workload, benchmark

EXAMPLES, THRESHOLD, LAYERS, TIMED = 4, 0.01, 3, 20


@benchmark
def cpu(device):
    """The last three layers: 13,816 edges."""
    if device != "cpu":
        return
    from pahq import CircuitFinder, tasks
    from pahq.acdc import Acdc
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    task, finder = tasks.ioi(tokenizer, EXAMPLES), CircuitFinder(model)
    graph, executor = finder.graph, finder.executor
    layers = range(graph.layers, graph.layers - LAYERS - 1, -1)
    edges = sum(
        graph.upstream(r) for r in range(graph.receivers) if graph.place(r)[0] in layers
    )  # fmt: skip
    held = {}

    def search():
        state, measure = finder._begin(task, "kl", "patch", 32)
        acdc = Acdc(state, measure, THRESHOLD, rows=32)
        begin = time.perf_counter()
        for layer in layers:
            acdc.layer(layer)
        held.update(found=acdc.found, state=state, measure=measure)
        return (time.perf_counter() - begin) / acdc.found.tested

    @torch.no_grad()
    def plain():
        begin = time.perf_counter()
        for _ in range(TIMED):
            model(task.clean, use_cache=False).logits.log_softmax(-1)
        return (time.perf_counter() - begin) / TIMED

    @torch.no_grad()
    def patched():
        state, measure = finder._begin(task, "kl", "patch", 32)
        begin = time.perf_counter()
        for sender in range(TIMED // 4):
            present = state.present.clone()
            present[sender, graph.logits] = False
            measure(executor.run(present, task.clean, state.corrupted).final[None])
        return (time.perf_counter() - begin) / (TIMED // 4)

    @torch.no_grad()
    def check():
        search()
        found, state, measure = held["found"], held["state"], held["measure"]
        again = executor.run(state.present, task.clean, state.corrupted)
        assert abs(float(measure(again.final[None])[0]) - found.value) < 1e-5
        assert found.tested + found.skipped == edges
        assert 0 < found.kept < found.tested

    check()
    found = held["found"]
    yield Workload(
        name="acdc/last-three-layers", device=device, check=check, baseline="one run each",
        clock="returned",
        params={
            "model": "SmolLM2-135M-Instruct", "examples": EXAMPLES, "tokens": task.clean.shape[1],
            "threshold": THRESHOLD, "edges": edges, "tested": found.tested,
            "skipped": found.skipped, "kept": found.kept, "batches": found.batches,
            "rows": found.rows,
        },
        arms=[Arm(name="one run each", fn=plain),
              Arm(name="one patched run each", fn=patched),
              Arm(name="pahq", fn=search)],
    )  # fmt: skip
