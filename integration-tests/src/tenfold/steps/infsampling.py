"""The tour's step of infsampling: groups of sixteen in eight slots, beside `generate`, and GRPO."""

from __future__ import annotations

import random
import re
import tempfile
import time
from typing import Any

from tenfold import plots
from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table

GROUP, SLOTS = 16, 8
WORDS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
TEXT = "Name a colour and say why you like it, in one sentence."


def brief(completions: list[Any], word: list[str], **columns: Any) -> list[float]:
    """Reward an answer that has the word by one over its number of words."""
    found = []
    for (message,), wanted in zip(completions, word, strict=True):
        text = message["content"].lower()
        there = re.search(rf"\b{wanted}\b", text)
        found.append(1 / len(text.split()) if there else 0.0)
    return found


def teach(model: Any, tokenizer: Any, steps: int, tokens: int) -> list[dict[str, float]]:
    """Let the model learn by GRPO to say one word; return what each step logged."""
    from infsampling import GRPOConfig, GRPOTrainer
    from transformers import PrinterCallback

    chosen = random.Random(0)
    rows = []
    for word in (chosen.choice(WORDS) for _ in range(64)):
        text = f"Answer with the word {word} and nothing else."
        rows.append({"prompt": [{"role": "user", "content": text}], "word": word})
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model, brief,
            GRPOConfig(
                output_dir=folder, per_device_train_batch_size=GROUP, num_generations=GROUP,
                max_completion_length=tokens, max_slots=SLOTS, learning_rate=3e-5,
                lr_scheduler_type="constant", temperature=0.8, max_steps=steps, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            ),
            rows, processing_class=tokenizer,
        )  # fmt: skip
        # what is logged is for the report alone
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [line for line in trainer.state.log_history if "reward" in line]


class InfsamplingStep:
    """Samples a group in half the slots, with pauses and as transformers does, and learns."""

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
        tokens = 6 if context.quick else 40
        config = SamplingConfig(
            max_slots=SLOTS, max_new_tokens=tokens, policy="fifo", turn=max(2, tokens // 4),
            sync_every=2, rerank_every=2,
        )  # fmt: skip
        context.progress(0.1, f"{GROUP} answers in {SLOTS} slots")
        sampler = InfiniteSampler(model, config, processing_class=tokenizer)
        begin = time.perf_counter()
        found = sampler.generate([ids], GROUP)
        ours = time.perf_counter() - begin
        context.progress(0.25, "the same with pauses")
        paused = InfiniteSampler(model, config.replace(policy="turns"), processing_class=tokenizer)
        other = paused.generate([ids], GROUP)
        if other.completion_ids != found.completion_ids or other.logprobs != found.logprobs:
            raise StepFailed("pauses changed an answer")
        context.progress(0.4, "generate, all at once")
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
        context.progress(0.5, "GRPO: to say one word")
        begin = time.perf_counter()
        lessons = teach(model, tokenizer, *((1, 4) if context.quick else (8, 10)))
        taught = time.perf_counter() - begin
        rewards = [line["reward"] for line in lessons]
        first, last = rewards[0], sum(rewards[-2:]) / len(rewards[-2:])
        if not context.quick and last <= first:
            raise StepFailed(f"the reward did not rise: {first:.2f} at first, {last:.2f} at last")
        return StepResult(
            headline=(
                f"{GROUP} answers in {SLOTS} slots: {stats.kv_bytes / plan.full_group:.2f} of the "
                f"keys and values of a full group, {stats.decode_steps} steps for at least "
                f"{max(work)}; a reward of {first:.2f} before GRPO and {last:.2f} after"
            ),
            text=(
                f"SmolLM2-135M-Instruct answers one question {GROUP} times. The prompt is computed "
                f"and held once; {SLOTS} answers are decoded at a time, and the next begins in the "
                f"step after one has ended. Decoded again with {other.stats.swaps} pauses, every "
                "token and every log-probability is the same, bit for bit.",
                "Below, what each policy makes of these lengths in half as many slots, if they "
                "were known. Policies that pause may cut answers in pieces: their bound is lower.",
                f"Then it learns: asked to answer with one word and nothing else, an answer that "
                "has the word gets one over its number of words. Each of "
                f"{len(rewards)} steps samples {GROUP} answers to a prompt in {SLOTS} slots and "
                "learns from all of them behind one copy of the prompt; all weights are trained, "
                f"in float32, in {taught:.0f} s together. One prompt a step is noisy, and one run "
                "shows that the parts work, not what the method is worth.",
            ),
            metrics=(
                Metric("reward after GRPO", last, "", first, "before", 2),
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
            plots=(_curve(rewards),),
        )  # fmt: skip


def _curve(rewards: list[float]) -> Plot:
    def draw(axes: Any) -> None:
        axes.plot(range(1, len(rewards) + 1), rewards, marker="o", color=plots.PALETTE[0])
        axes.set_xlabel("step")
        axes.set_ylabel("mean reward")
        axes.set_ylim(0, 1.05)
        axes.xaxis.get_major_locator().set_params(integer=True)

    title = "Reward of each step's answers"
    return Plot(title, plots.svg(draw, title=title), "1 is the word and nothing else.")


STEP = InfsamplingStep()
