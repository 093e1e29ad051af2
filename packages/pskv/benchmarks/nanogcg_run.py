"""nanogcg as it is installed, and the same inside ``accelerate()``.

Some steps of a search by SmolLM2-135M, loading and tokenising included. nanogcg's own cache raises
on transformers 5, so it passes whole rows, at the batch that it finds to fit. In float32 both must
find the same strings.
"""

from __future__ import annotations

import torch
from shared_kernels.bench import Arm, Workload, benchmark

TARGET = "Hello, sunshine!"
#: Lines of a longer instruction, of about 12 tokens each.
LINE = "Be kind, be brief, and answer in one plain sentence. "


@benchmark
def nanogcg_run(device):
    """Whole runs."""
    import nanogcg
    from pskv.integrations.nanogcg import accelerate
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    on_gpu = device != "cpu"
    for dtype in (torch.float32, *([torch.bfloat16] if on_gpu else [])):
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype).to(device).eval()
        message = LINE * 15 + "Write a short greeting."
        steps, width = (4, 512) if on_gpu else (2, 24)
        config = nanogcg.GCGConfig(
            num_steps=steps, search_width=width, topk=64, seed=7, verbosity="ERROR",
            optim_str_init="x x x x x x", use_prefix_cache=False,
        )  # fmt: skip

        def plain(model=model, message=message, config=config):
            return nanogcg.run(model, tokenizer, message, TARGET, config)

        def shared(plain=plain):
            with accelerate():
                return plain()

        def check(plain=plain, shared=shared, dtype=dtype):
            expected, found = plain(), shared()
            if dtype == torch.float32:
                assert found.strings == expected.strings

        name = str(dtype).removeprefix("torch.")
        tokens = len(tokenizer(message)["input_ids"])
        yield Workload(
            name=f"nanogcg/{name}, {tokens} tokens", baseline="nanogcg", check=check,
            device=device, clock="wall",
            params={"steps": steps, "width": width, "tokens": tokens, "dtype": name},
            arms=[Arm(name="nanogcg", fn=plain), Arm(name="nanogcg with pskv", fn=shared)],
        )  # fmt: skip
