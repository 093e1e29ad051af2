"""One batch of removals in layers of the shape of Llama-3.1-8B, whose weights are random.

Random weights prove time, bytes and identities, and nothing of a circuit. The circuit has all MLPs
and a few heads of each layer; 32 rows remove edges into the first MLP, so that three layers follow.
"""

import torch
from shared_kernels.bench import Arm, Workload, benchmark

LAYERS, HEADS, ROWS, EXAMPLES, TOKENS = 4, 2, 32, 32, 16


@benchmark
def wide(device):
    """BF16 against FP8, and float32, on what follows the first MLP."""
    if device != "cuda":
        return
    from pahq import CircuitFinder, Task
    from pahq.acdc import Search
    from pahq.batches import Settings
    from pahq.rows import Rows
    from pahq.suffix import Suffix
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    finder = CircuitFinder(model, check=False)
    graph = finder.graph
    ids = torch.randint(4096, (2, EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    last = torch.full((EXAMPLES,), TOKENS - 1)
    task = Task(ids[0], ids[1], last, torch.zeros(EXAMPLES, dtype=torch.int64))
    receiver = graph.columns(0, "mlp").start
    tries, values = {}, {}
    senders = graph.candidates(receiver)[:ROWS]
    for name in ("bf16-delta", "fp8-delta", "fp32"):
        current, measure = finder._begin(task, "kl", "patch")
        for layer in range(LAYERS):
            for head in range(HEADS, graph.heads):
                current.edges[graph.head(layer, head)] = False
        for r in graph.order():
            current.close(r)
        rows = Rows(current, measure, Settings(ROWS, name, 64 << 30), Search())
        rows.begin()
        suffix = Suffix(current, [receiver])

        def batch(rows=rows, suffix=suffix):
            return rows.remove(suffix, senders, [True] * ROWS, None, [""] * ROWS)[0]

        tries[name] = batch

    def check():
        for name, batch in tries.items():
            values[name] = torch.tensor(batch(), dtype=torch.float64)
        for name, most in (("bf16-delta", 0.01), ("fp8-delta", 0.05)):
            error = (values[name] - values["fp32"]).abs() / values["fp32"].abs()
            assert float(error.max()) < most, error

    yield Workload(
        name="suffix/4096-wide", device=device, check=check, baseline="bf16-delta", clock="wall",
        params={"layers": LAYERS, "heads of each": HEADS, "rows": ROWS, "examples": EXAMPLES,
                "tokens": TOKENS, "weights": "random, bfloat16"},
        arms=[Arm(name=name, fn=batch) for name, batch in tries.items()],
    )  # fmt: skip
