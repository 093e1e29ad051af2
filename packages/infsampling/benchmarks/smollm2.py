"""SmolLM2-135M-Instruct on a CPU: a group in half the slots, beside `generate` on the whole group.

In float32. Both answer the same question sixteen times, with measured lengths (those of SmolLM2's
answers in ``tests/scheduling/smollm2_lengths.json``, scaled to the longest), so that both make as
many tokens: `generate` is given a processor that ends a row there, as it would end by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from shared_kernels.bench import Arm, Workload, benchmark

MEASURED = Path(__file__).parent.parent / "tests" / "scheduling" / "smollm2_lengths.json"
GROUP, SLOTS, LONGEST = 16, 8, 64
TEXT = "Name a colour and say why you like it, in one sentence."


@benchmark
def cpu(device):
    if device != "cpu":
        return
    from infsampling import InfiniteSampler, SamplingConfig
    from tenfold.assets import smollm2
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LogitsProcessor,
        LogitsProcessorList,
    )

    found = np.concatenate(list(json.loads(MEASURED.read_text())["groups"]))
    drawn = np.random.default_rng(0).choice(found, GROUP)
    forced = np.maximum(1, np.ceil(drawn * LONGEST / 512)).astype(int).tolist()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]

    class EndsThere(LogitsProcessor):
        def __call__(self, lines, scores):
            ends = torch.tensor(forced) <= lines.shape[1] - len(ids) + 1
            only = torch.full_like(scores, float("-inf"))
            only[:, 2] = 0.0
            # never the padding, by which lengths are counted
            never = scores.index_fill(1, torch.tensor([0, 2]), float("-inf"))
            return torch.where(ends[:, None], only, never)

    def generate():
        lines = torch.tensor([ids] * GROUP)
        with torch.no_grad():
            made = model.generate(
                lines, attention_mask=torch.ones_like(lines), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=LONGEST, eos_token_id=2, pad_token_id=0,
                logits_processor=LogitsProcessorList([EndsThere()]),
            )[:, len(ids) :]  # fmt: skip
        return [int((row != 0).sum()) for row in made]

    samplers = {
        slots: InfiniteSampler(model, SamplingConfig(max_slots=slots, max_new_tokens=LONGEST))
        for slots in (SLOTS, GROUP)
    }

    def ours(slots):
        return samplers[slots].generate([ids], GROUP, forced_lengths=forced)

    def check():
        assert generate() == forced
        for slots in samplers:
            assert [len(tokens) for tokens in ours(slots).completion_ids] == forced

    stats = {slots: ours(slots).stats for slots in samplers}
    yield Workload(
        name=f"smollm2/{GROUP}", device=device, check=check, baseline="generate", clock="wall",
        params={
            "samples": GROUP, "prompt": len(ids), "longest": max(forced), "tokens": sum(forced),
            "kv_bytes": {str(slots): found.kv_bytes for slots, found in stats.items()},
            "kv_bytes_of_a_full_group": samplers[SLOTS].plan([len(ids)], GROUP).full_group,
            "steps": {str(slots): found.decode_steps for slots, found in stats.items()},
        },
        arms=[
            Arm(name="generate", fn=generate),
            *(Arm(name=f"infsampling, {slots} slots", fn=lambda slots=slots: ours(slots))
              for slots in samplers),
        ],
    )  # fmt: skip
