"""ACDC on SmolLM2-135M-Instruct, seconds for each removal that is tried.

``one run each`` is what a sequential search takes at least: the plain float32 forward pass of
transformers on the same pairs, without any hook, and the metric. ``one patched run each`` is the
sequential search as it is defined, with this package's patched run in float32. Both are timed on
some removals, the search on all of them.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import torch
from shared_kernels.bench import Arm, Workload, benchmark

if TYPE_CHECKING:
    from pahq.acdc import Search

THRESHOLD = 0.01


class Case:
    """A task, a model, and searches of it.

    Args:
        device: Of the model.
        examples: Pairs of IOI.
    """

    def __init__(self, device: str, examples: int) -> None:
        from pahq import CircuitFinder, tasks
        from tenfold.assets import smollm2
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        self.model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        self.model = self.model.eval().to(device)
        self.task, self.finder = tasks.ioi(tokenizer, examples), CircuitFinder(self.model)
        self.graph, self.clean = self.finder.graph, self.task.clean.to(device)
        self.device, self.draws = device, torch.Generator().manual_seed(0)
        self.found: dict[str, Search] = {}
        self.present: dict[str, torch.Tensor] = {}
        self.peak: dict[str, int] = {}

    def now(self) -> float:
        """Return seconds, with nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def offloaded(self):
        """Return a finder whose layers are in the host's memory."""
        from pahq import CircuitFinder

        return CircuitFinder(copy.deepcopy(self.model).cpu(), offload="cpu", device=self.device)

    def measured(self, name, weights, call):
        """Call, and note the largest memory on the GPU, with that of weights."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.peak[name] = torch.cuda.max_memory_allocated() - before + weights

    def search(self, layers, precision="fp32", rows=64, budget=None, name=None, finder=None):
        """Return seconds for each removal of the layers' edges."""
        from pahq.acdc import Acdc

        finder = finder or self.finder
        settings = finder._settings(precision, rows, budget)
        current, measure = finder._begin(self.task, "kl", "patch", precision)
        begin = self.now()
        acdc = Acdc(current, measure, THRESHOLD, settings)
        for layer in layers:
            acdc.layer(layer)
        spent = self.now() - begin
        name = name or precision
        self.found[name], self.present[name] = acdc.found, current.present
        return spent / acdc.found.tested

    @torch.no_grad()
    def plain(self, count):
        """Return seconds of a forward pass."""
        begin = self.now()
        for _ in range(count):
            self.model(self.clean, use_cache=False).logits.log_softmax(-1)
        return (self.now() - begin) / count

    @torch.no_grad()
    def patched(self, count):
        """Return seconds of a patched run, each without another edge, drawn at random.

        Each call draws others.
        """
        from pahq.metrics import Metric

        executor = self.finder.executor
        base = executor.plain(self.task.corrupted.to(self.device))
        measure = Metric("kl", self.finder.adapter, self.task, executor.plain(self.clean).final)
        full = torch.from_numpy(self.graph.full())
        edges = full.nonzero()
        drawn = edges[torch.randint(len(edges), (count,), generator=self.draws)]
        begin = self.now()
        for sender, receiver in drawn.tolist():
            present = full.clone()
            present[sender, receiver] = False
            measure(executor.run(present, self.clean, base).final[None]).tolist()
        return (self.now() - begin) / count

    def value(self, present):
        """Return the metric of a circuit by one whole patched run."""
        from pahq.metrics import Metric

        executor = self.finder.executor
        base = executor.plain(self.task.corrupted.to(self.device))
        measure = Metric("kl", self.finder.adapter, self.task, executor.plain(self.clean).final)
        with torch.no_grad():
            return float(measure(executor.run(present, self.clean, base).final[None])[0])

    def about(self, name="fp32"):
        """Return what a search did."""
        found = self.found[name]
        return {
            "model": "SmolLM2-135M-Instruct", "examples": len(self.clean),
            "tokens": self.clean.shape[1], "threshold": THRESHOLD, "tested": found.tested,
            "skipped": found.skipped, "kept": found.kept, "batches": found.batches,
            "rows": found.rows,
        }  # fmt: skip


@benchmark
def cpu(device):
    """The last three layers: 13,816 edges."""
    if device != "cpu":
        return
    case = Case("cpu", 4)
    layers = range(case.graph.layers, case.graph.layers - 4, -1)
    edges = sum(
        case.graph.upstream(r)
        for r in range(case.graph.receivers)
        if case.graph.place(r)[0] in layers
    )

    def check():
        case.search(layers, rows=32)
        found = case.found["fp32"]
        assert abs(case.value(case.present["fp32"]) - found.value) < 1e-5
        assert found.tested + found.skipped == edges
        assert 0 < found.kept < found.tested

    check()
    yield Workload(
        name="acdc/last-three-layers", device=device, check=check, baseline="one run each",
        clock="returned", params={**case.about(), "edges": edges},
        arms=[Arm(name="one run each", fn=lambda: case.plain(20)),
              Arm(name="one patched run each", fn=lambda: case.patched(5)),
              Arm(name="pahq", fn=lambda: case.search(layers, rows=32))],
    )  # fmt: skip


@benchmark
def whole(device):
    """All 70,651 edges, on 64 pairs."""
    if device != "cuda":
        return
    case = Case("cuda", 64)
    layers = range(case.graph.layers, -1, -1)
    name, small = "bf16-delta", "bf16-delta, 512 MiB of rows"

    def check():
        if case.found:
            return
        case.search(layers, name)
        case.search(layers, name, budget=512 << 20, name=small)
        for arm, found in case.found.items():
            assert abs(case.value(case.present[arm]) - found.value) < 1e-5
            assert found.tested + found.skipped == case.graph.edges
        assert torch.equal(case.present[name], case.present[small])

    check()
    yield Workload(
        name="acdc/whole", device=device, check=check, baseline="one run each", clock="returned",
        params={**case.about(name), "edges": case.graph.edges},
        arms=[Arm(name="one run each", fn=lambda: case.plain(50)),
              Arm(name="one patched run each", fn=lambda: case.patched(100)),
              Arm(name=name, fn=lambda: case.search(layers, name)),
              Arm(name=small, fn=lambda: case.search(layers, name, budget=512 << 20))],
    )  # fmt: skip


@benchmark
def precisions(device):
    """All 70,651 edges in each precision: decisions and memory; those of two layers are timed."""
    if device != "cuda":
        return
    case = Case("cuda", 64)
    layers = range(case.graph.layers, -1, -1)
    last = layers[:3]
    weights = sum(p.nbytes for p in case.model.parameters())
    before = torch.cuda.memory_allocated()
    finder = case.offloaded()
    resident = torch.cuda.memory_allocated() - before
    small, least = "bf16-delta, 256 MiB of rows", "bf16-delta, 64 MiB of rows, layers offloaded"
    options = {
        "fp32": {"precision": "fp32"}, "bf16-delta": {"precision": "bf16-delta"},
        "fp8-delta": {"precision": "fp8-delta"},
        small: {"precision": "bf16-delta", "budget": 256 << 20},
        least: {"precision": "bf16-delta", "budget": 64 << 20, "finder": finder},
    }  # fmt: skip
    judged = {}

    def search(name, layers):
        return lambda: case.search(layers, name=name, **options[name])

    def check():
        if judged:
            return
        case.measured("one patched run", weights, lambda: case.patched(3))
        for name in options:
            begin = case.now()
            case.measured(name, resident if name == least else weights, search(name, layers))
            found = case.found[name]
            assert abs(case.value(case.present[name]) - found.value) < 1e-5
            unlike = case.present[name] != case.present["fp32"]
            judged[name] = {
                "seconds": case.now() - begin, "other decisions": int(unlike.sum()),
                "tried again": found.checked / found.tested, "batches": found.batches,
                "rows": found.rows,
            }  # fmt: skip
            if unlike.any():
                # behind an edge on the threshold's very edge, all that follows may differ
                effects = case.found["fp32"].effects
                first = next(edge for edge in effects if unlike[edge])
                assert abs(effects[first] - THRESHOLD) < 1e-6

    check()
    yield Workload(
        name="acdc/precisions", device=device, check=check, baseline="fp32", clock="returned",
        params={
            **case.about(), "edges": case.graph.edges, "whole searches": judged,
            "peak bytes, weights included": dict(case.peak), "timed": "the last two layers",
        },
        arms=[Arm(name=name, fn=search(name, last)) for name in options],
    )  # fmt: skip


@benchmark
def roundings(device):
    """The last layers: activations rounded as published, and differences.

    On a GPU four layers and 16 pairs, on a CPU one and 4.
    """
    pairs, depth = (16, 4) if device == "cuda" else (4, 1)
    case = Case(device, pairs)
    layers = range(case.graph.layers, case.graph.layers - depth - 1, -1)
    names = ("fp32", "bf16-delta", "fp8-delta", "fp8-rtn", "rtn-q")
    judged = {}

    def check():
        if judged:
            return
        columns = [r for r in range(case.graph.receivers) if case.graph.place(r)[0] in layers]
        for name in names:
            case.search(layers, name)
            kept = case.present[name][:, columns]
            exact = case.present["fp32"][:, columns]
            judged[name] = {
                "kept": int(kept.sum()), "other decisions": int((kept != exact).sum()),
                "jaccard": float((kept & exact).sum() / (kept | exact).sum()),
                "kl of the circuit": case.value(case.present[name]),
                "tested": case.found[name].tested,
            }  # fmt: skip
        assert judged["bf16-delta"]["other decisions"] == 0
        assert judged["fp8-delta"]["other decisions"] == 0

    check()
    yield Workload(
        name="acdc/roundings", device=device, check=check, baseline="fp32", clock="returned",
        params={**case.about(), "layers": depth, "judged": judged},
        arms=[Arm(name=name, fn=lambda n=name: case.search(layers, n)) for name in names[::3]],
    )  # fmt: skip
