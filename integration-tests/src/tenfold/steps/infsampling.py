"""The tour's step of infsampling: a group of sixteen in eight slots, beside `generate`."""

from __future__ import annotations

import time
from typing import Any

from tenfold.step import Context, Metric, StepFailed, StepResult, Table

GROUP, SLOTS = 16, 8
TEXT = "Name a colour and say why you like it, in one sentence."


class InfsamplingStep:
    """Samples a group in half the slots, under three schedules, and as transformers does."""

    name = "infsampling"
    title = "a group of answers in half the memory"

    def run(self, context: Context) -> StepResult:
        """Sample, compare, and simulate all policies on the lengths that came out."""
        import torch
        from infsampling import InfiniteSampler, SamplingConfig
        from infsampling.scheduling.simulator import SIMULATED, simulate
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tenfold.assets import smollm2

        context.progress(0.0, "loading SmolLM2")
        tokenizer: Any = AutoTokenizer.from_pretrained(smollm2())
        model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens = 6 if context.quick else 64
        config = SamplingConfig(
            max_slots=SLOTS, max_new_tokens=tokens, policy="fifo", turn=max(2, tokens // 4),
            sync_every=2, rerank_every=2,
        )  # fmt: skip
        context.progress(0.1, f"{GROUP} answers in {SLOTS} slots")
        sampler = InfiniteSampler(model, config, processing_class=tokenizer)
        begin = time.perf_counter()
        found = sampler.generate([ids], GROUP)
        ours = time.perf_counter() - begin
        context.progress(0.4, "the same with pauses")
        paused = InfiniteSampler(model, config.replace(policy="turns"), processing_class=tokenizer)
        other = paused.generate([ids], GROUP)
        if other.completion_ids != found.completion_ids or other.logprobs != found.logprobs:
            raise StepFailed("pauses changed an answer")
        context.progress(0.7, "generate, all at once")
        begin = time.perf_counter()
        with torch.no_grad():
            lines = model.generate(
                torch.tensor([ids] * GROUP), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=tokens, pad_token_id=0, eos_token_id=sampler.eos_token_ids(),
            )[:, len(ids) :]  # fmt: skip
        plain = time.perf_counter() - begin
        made = int((lines != 0).sum())
        plan = sampler.plan([len(ids)], GROUP)
        work = [len(answer) - 1 for answer in found.completion_ids]
        results = {policy: simulate(work, SLOTS // 2, policy) for policy in SIMULATED}
        stats = found.stats
        return StepResult(
            headline=(
                f"{GROUP} answers in {SLOTS} slots: {stats.kv_bytes / plan.full_group:.2f} of the "
                f"keys and values of a full group, {stats.decode_steps} steps for at least "
                f"{max(work)}"
            ),
            text=(
                f"SmolLM2-135M-Instruct answers one question {GROUP} times. The prompt is computed "
                f"and held once; {SLOTS} answers are decoded at a time, and the next begins in the "
                f"step after one has ended. Decoded again with {other.stats.swaps} pauses, every "
                "token and every log-probability is the same, bit for bit.",
                "Below, what each policy makes of these lengths in half as many slots, if they "
                "were known. Policies that pause may cut answers in pieces: their bound is lower.",
            ),
            metrics=(
                Metric("keys and values", stats.kv_bytes / 1e6, "MB", plan.full_group / 1e6,
                       "a full group with a prompt each"),
                Metric("tokens a second", stats.new_tokens / ours, "", made / plain,
                       "generate, 16 rows at once"),
                Metric("prompt tokens computed", stats.prefill_tokens, "", GROUP * len(ids),
                       "generate", 0),
                Metric("decoding steps", stats.decode_steps, "", max(work), "a slot for each", 0),
            ),
            tables=(
                Table(
                    f"Steps in {SLOTS // 2} slots",
                    ("policy", "steps", "over the bound", "pauses"),
                    tuple(
                        (policy, str(r.steps), f"{r.over_bound:.2f}", str(r.swaps))
                        for policy, r in results.items()
                    ),
                ),
            ),
        )  # fmt: skip


STEP = InfsamplingStep()
