"""One step of a search: 512 candidates that differ from a parent in one token, on one prefix.

Llama-3-8B's shape in bfloat16 with random weights: time and memory say something, scores do not.
Suffix 20 tokens, tail 5, target 20. The peers run in the same process on the same candidates, each
at the batch that a trial found fastest for it, and compute logits at the targets only, which the
tools they stand for do not: "no cache" passes whole rows, "replicate" copies the prefix's keys and
values for every row of a batch and keeps all layers' copies, "layerwise" copies them in each layer
and drops them (the paper's way).
"""

from __future__ import annotations

import time

import numpy as np
import torch
from shared_kernels.bench import Arm, Workload, benchmark

ROWS, SUFFIX, TAIL, TARGET = 512, 20, 5, 20
LAYERS = 32
BATCHES = {"no cache": (16, 32), "replicate": (512, 256, 128, 64), "layerwise": (512, 256, 128)}


@benchmark
def llama_8b(device):
    if device == "cpu":
        return
    problem = _Problem(device)
    for prefix in (256, 1024, 4096):
        yield _workload(problem, prefix)


class _Problem:
    def __init__(self, device):
        from pskv import PrefixScorer
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=8,
            max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            self.model = LlamaForCausalLM(config).eval()
            torch.set_default_dtype(default)
        self.device = device
        self.scorer = PrefixScorer(self.model, backend="fused")
        self.generator = np.random.default_rng(0)
        self.target = self.ids(TARGET)
        self.prefix = None
        self.candidates = None

    def ids(self, *shape):
        return self.generator.integers(0, 128256, shape)

    def begin(self, length):
        if self.prefix is not None:
            self.prefix.close()
        self.prefix = self.scorer.prefill(self.ids(length))
        self.propose()

    def propose(self):
        """Make the candidates of a step."""
        rows = np.tile(self.ids(SUFFIX + TAIL), (ROWS, 1))
        rows[np.arange(ROWS), self.generator.integers(0, SUFFIX, ROWS)] = self.ids(ROWS)
        self.candidates = torch.from_numpy(rows)

    def ours(self):
        return self.scorer.score(self.prefix, self.candidates, targets=self.target).logprobs

    @torch.no_grad()
    def peer(self, name, batch):
        from transformers import DynamicCache

        held = self.prefix.length
        target = torch.from_numpy(self.target)
        rows = torch.cat([self.candidates, target.expand(ROWS, -1)], 1).to(self.device)
        found = []
        for part in rows.split(batch):
            options = {}
            if name == "no cache":
                before = self.prefix.ids.to(self.device).expand(len(part), -1)
                part = torch.cat([before, part], 1)
            else:
                cache = self.prefix.cache
                if name == "replicate":
                    cache = DynamicCache()
                    for index, layer in enumerate(self.prefix.cache.held):
                        keys, values = (
                            x[:held].transpose(0, 1)[None].expand(len(part), -1, -1, -1)
                            for x in (layer.keys, layer.values)
                        )
                        cache.update(keys, values, index)
                options = {"past_key_values": cache, "use_cache": True}
            with self.prefix.cache.mode("expand"):
                logits = self.model(part, logits_to_keep=TARGET + 1, **options).logits[:, :-1]
            flat = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), part[:, -TARGET:].flatten(), reduction="none"
            )
            found.append(-flat.view(len(part), TARGET).sum(1))
            del logits, options
        return torch.cat(found).cpu()

    def best_batch(self, name):
        """Return the fastest batch that fits."""
        seconds = {}
        for batch in BATCHES[name]:
            try:
                self.peer(name, batch)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                self.peer(name, batch)
                torch.cuda.synchronize()
                seconds[batch] = time.perf_counter() - begin
            except torch.OutOfMemoryError:
                pass
            torch.cuda.empty_cache()
            if name == "no cache" and self.prefix.length > 256:
                break
        return min(seconds, key=seconds.get)

    def check(self):
        ours, peer = self.ours(), self.peer("layerwise", 64)
        assert (ours - peer).abs().max() <= 0.01 * peer.abs().max()


def _workload(problem, prefix):
    problem.begin(prefix)
    names = [name for name in BATCHES if name != "no cache" or prefix <= 1024]
    batches = {name: problem.best_batch(name) for name in names}

    def check():
        problem.check()

    def arm(name, fn):
        return Arm(name=name, fn=fn, setup=problem.propose)

    return Workload(
        name=f"step/llama-3-8b, {prefix} tokens",
        params={
            "prefix": prefix, "rows": ROWS, "suffix": SUFFIX, "tail": TAIL, "target": TARGET,
            "layers": LAYERS, "dtype": "bf16", "batches": batches, "peers_logits": "targets",
            "tokens_per_pass": problem.scorer._micro.tokens,
        },
        device=problem.device,
        check=check,
        clock="wall",
        baseline="replicate",
        arms=[
            *(arm(n, lambda n=n: problem.peer(n, batches[n])) for n in names),
            arm("pskv", problem.ours),
        ],
    )  # fmt: skip
