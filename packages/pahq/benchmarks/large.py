"""ACDC in a model of the shape of Llama-3.1-8B, projected from slices of it.

Random weights prove time, bytes and identities, and nothing of a circuit. What is behind a slice is
a random circuit that is as dense as that of indirect object identification in SmolLM2-135M at 0.01
(acdc-whole-nvidia-h200.json): all MLPs and 6 of 32 heads of a layer write something that is read,
and of those heads' queries, keys and values about a third read something, 4 senders each. In some
layers all edges into the MLP, into a query and into a value are then decided, with a threshold that
half a percent of them exceed. Seconds for each removal are interpolated between those layers. Not
in them are the first runs, and that what is decided is computed once more after each layer.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from shared_kernels.bench import Arm, Workload, benchmark

EXAMPLES, TOKENS, ROWS = 16, 16, 64
#: Heads of a layer that write something that is read.
HEADS = 6
#: In which slices are timed.
LAYERS = (31, 24, 16, 8, 1)
KEPT = 0.005


class Slices:
    """A model, and slices of searches in it."""

    def __init__(self) -> None:
        from pahq import CircuitFinder, Task
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16",
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.finder = CircuitFinder(self.model, check=False)
        self.graph = self.finder.graph
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (2, EXAMPLES, TOKENS), generator=draws)
        last = torch.full((EXAMPLES,), TOKENS - 1)
        self.task = Task(ids[0], ids[1], last, torch.zeros(EXAMPLES, dtype=torch.int64))
        self.clean = ids[0].cuda()
        self.draws = np.random.default_rng(0)
        self.heads = [
            sorted(self.draws.choice(self.graph.heads, HEADS, replace=False).tolist())
            for _ in range(self.graph.layers)
        ]
        self.circuit = self._circuit()
        self.threshold: float | None = None
        self.spent: dict[str, dict[int, float]] = {}
        self.counts: dict[str, int] = {}

    def _circuit(self) -> np.ndarray:
        graph, draws = self.graph, self.draws
        live = [0]
        for layer, heads in enumerate(self.heads):
            live += [*(graph.head(layer, head) for head in heads), graph.mlp(layer)]
        found = np.zeros_like(graph.full())

        def read(receiver: int, count: int) -> None:
            before = [s for s in live if s < graph.upstream(receiver)]
            found[draws.choice(before, min(count, len(before)), replace=False), receiver] = True

        read(graph.logits, 16)
        for layer, heads in enumerate(self.heads):
            read(graph.columns(layer, "mlp").start, 4)
            for head in heads:
                key = head // graph.group
                for part, index, share in (("q", head, 0.3), ("k", key, 0.2), ("v", key, 0.3)):
                    if draws.random() < share:
                        read(graph.columns(layer, part).start + index, 4)
        # what writes is read by some MLP of a layer behind it, or by the logits
        for layer, heads in enumerate(self.heads):
            behind = [graph.columns(later, "mlp").start for later in range(layer + 1, graph.layers)]
            for sender in [*(graph.head(layer, head) for head in heads), graph.mlp(layer)]:
                if not found[sender, graph.columns(layer, "mlp").stop :].any():
                    found[sender, draws.choice([*behind, graph.logits])] = True
        return found

    def removals(self, layer: int) -> dict[str, int]:
        """Return how many removals of a layer would be tried, by what reads."""
        graph = self.graph
        keys = len({head // graph.group for head in self.heads[layer]})
        heads, mlp = (graph.upstream(graph.columns(layer, part).start) for part in ("q", "mlp"))
        return {"mlp": mlp, "q": HEADS * heads, "kv": 2 * keys * heads}

    def search(self, precision: str, threshold: float) -> list[float]:
        """Decide the slices, and return the effects."""
        from pahq.acdc import Acdc

        graph = self.graph
        settings = self.finder._settings(precision, ROWS, None)
        current, measure = self.finder._begin(self.task, "kl", "patch")
        acdc = Acdc(current, measure, threshold, settings)
        self.spent = {"mlp": {}, "q": {}, "kv": {}}
        for layer in LAYERS:
            present = graph.full()
            behind = graph.columns(layer, "mlp").stop
            present[:, behind:] = self.circuit[:, behind:]
            acdc.continue_from(torch.from_numpy(present), layer + 1)
            head = self.heads[layer][0]
            for kind, part, index in (
                ("mlp", "mlp", 0),
                ("kv", "v", head // graph.group),
                ("q", "q", head),
            ):
                tested = acdc.found.tested
                torch.cuda.synchronize()
                begin = time.perf_counter()
                acdc._receiver(graph.columns(layer, part).start + index)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - begin
                self.spent[kind][layer] = seconds / (acdc.found.tested - tested)
        found = acdc.found
        self.counts = {"tested": found.tested, "kept": found.kept, "batches": found.batches,
                       "rows": found.rows, "tried again": found.checked}  # fmt: skip
        return list(found.effects.values())

    def projected(self) -> tuple[float, int]:
        """Return seconds of a whole search, and how many removals it would try."""
        total, number = 0.0, 0
        known = sorted(LAYERS)
        for layer in range(self.graph.layers):
            for kind, count in self.removals(layer).items():
                each = np.interp(layer, known, [self.spent[kind][k] for k in known])
                total += float(each) * count
                number += count
        return total, number

    def each(self, precision: str) -> float:
        """Return projected seconds of a removal."""
        assert self.threshold is not None
        self.search(precision, self.threshold)
        total, number = self.projected()
        return total / number

    @torch.no_grad()
    def plain(self, count: int) -> float:
        """Return seconds of a forward pass."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            self.model(self.clean, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count


@benchmark
def large(device):
    """Slices of a search of 805,681 edges."""
    if device != "cuda":
        return
    slices = Slices()
    assert slices.graph.edges == 805681
    # without a threshold that counts, all go: these are the effects there are
    effects = slices.search("bf16-delta", 1e9)
    slices.threshold = max(float(np.quantile(effects, 1 - KEPT)), 1e-12)
    slices.search("bf16-delta", slices.threshold)
    total, number = slices.projected()

    def check():
        assert 0 < slices.counts["kept"] < 0.05 * slices.counts["tested"]

    yield Workload(
        name="large/llama-3.1-8b", device=device, check=check, baseline="one run each",
        clock="returned",
        params={
            "weights": "random, bfloat16", "edges": slices.graph.edges, "examples": EXAMPLES,
            "tokens": TOKENS, "layers of slices": list(LAYERS),
            "removals of a whole search": number, "hours of a whole search": total / 3600,
            "threshold": slices.threshold,
            "seconds of a removal": {
                kind: {str(k): v for k, v in by.items()} for kind, by in slices.spent.items()
            },
            **slices.counts,
        },
        arms=[Arm(name="one run each", fn=lambda: slices.plain(10)),
              Arm(name="bf16-delta, projected", fn=lambda: slices.each("bf16-delta")),
              Arm(name="fp8-delta, projected", fn=lambda: slices.each("fp8-delta"))],
    )  # fmt: skip
