"""A whole step of GRPO beside TRL's trainer with its default rollouts.

On a GPU: Qwen3-0.6B's shape with random weights in bfloat16, so times and bytes say something and
texts do not. Both trainers have the same settings, AdamW, and gradient checkpointing, which is
TRL's default. Completions are cut at measured lengths: those of SmolLM2's answers in
``tests/scheduling/smollm2_lengths.json``, scaled to the longest. TRL's `generate` is given a
processor that lets a row end there, as it would by itself.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from shared_kernels.bench import Arm, Workload, benchmark

MEASURED = Path(__file__).parent.parent / "tests" / "scheduling" / "smollm2_lengths.json"
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 40960, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
COUNT, PROMPT, MICRO = 64, 256, 8


def lengths(longest):
    found = np.concatenate(list(json.loads(MEASURED.read_text())["groups"]))
    drawn = np.random.default_rng(0).choice(found, COUNT)
    return np.maximum(1, np.ceil(drawn * longest / 512)).astype(int).tolist()


def make_model(device):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, SHAPE["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 7.0 for ids in completion_ids]


def settings(folder, longest):
    return {
        "output_dir": folder, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": COUNT // MICRO, "num_generations": COUNT,
        "max_completion_length": longest, "max_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "bf16": False, "gradient_checkpointing": True,
        "learning_rate": 1e-6,
    }  # fmt: skip


def stopwatch():
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        """From the beginning of training, which is that of its only step, to the step's end."""

        def on_train_begin(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.began

    return Stopwatch()


def trl_trainer(device, folder, forced, longest):
    import trl
    from datasets import Dataset
    from transformers import LogitsProcessor, LogitsProcessorList

    class EndsThere(LogitsProcessor):
        def __call__(self, ids, scores):
            ends = torch.tensor(forced, device=ids.device) <= ids.shape[1] - PROMPT + 1
            only = torch.full_like(scores, float("-inf"))
            only[:, 2] = 0.0
            never = scores.clone()
            never[:, 2] = float("-inf")
            return torch.where(ends[:, None], only, never)

    model, watch = make_model(device), stopwatch()
    plain = model.generate
    model.generate = lambda *args, **kwargs: plain(
        *args, logits_processor=LogitsProcessorList([EndsThere()]), **kwargs
    )
    made = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=trl.GRPOConfig(**settings(folder, longest)),
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in range(10, 266))}]),
        processing_class=make_tokenizer(), callbacks=[watch],
    )  # fmt: skip
    return made, watch


def our_trainer(device, folder, forced, longest, slots):
    from infsampling import GRPOConfig, GRPOTrainer

    watch = stopwatch()
    made = GRPOTrainer(
        model=make_model(device), reward_funcs=reward,
        args=GRPOConfig(**settings(folder, longest), max_slots=slots),
        train_dataset=[{"prompt": " ".join(f"w{i}" for i in range(10, 266))}],
        processing_class=make_tokenizer(), callbacks=[watch],
    )  # fmt: skip
    plain = made.sampler.generate
    made.sampler.generate = lambda *args, **kwargs: plain(*args, forced_lengths=forced, **kwargs)
    return made, watch


def workload(name, device, longest, slots=None):
    """One optimizer step of both, with completions of at most ``longest`` tokens."""
    forced = lengths(longest)
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            "TRL": lambda: trl_trainer(device, folder, forced, longest),
            "infsampling": lambda: our_trainer(device, folder, forced, longest, slots),
        }
        peaks, trainers = {}, {}
        for arm, make in makers.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trainers[arm] = make()
            made = trainers[arm][0]
            # the second step has the optimizer's state from its beginning
            made.args.max_steps = 2
            made.train()
            peaks[arm] = torch.cuda.max_memory_allocated() - before
            made.args.max_steps = 1

        def run(arm):
            made, watch = trainers[arm]
            made.train()
            return watch.seconds

        def check():
            for made, _ in trainers.values():
                logged = [line for line in made.state.log_history if "reward" in line][-1]
                mean = logged["completions/mean_length"]
                assert abs(mean - sum(forced) / COUNT) < 1e-3, logged

        yield Workload(
            name=name, device=device, check=check, baseline="TRL", clock="returned",
            params={"samples": COUNT, "prompt": PROMPT, "longest": max(forced), "slots": slots,
                    "tokens": sum(forced), "micro_batch": MICRO, "shape": "Qwen3-0.6B",
                    "peak_bytes": peaks},
            arms=[Arm(name=arm, fn=lambda arm=arm: run(arm)) for arm in trainers],
        )  # fmt: skip


@benchmark
def step(device):
    """Sample, reward, learn: at most 256 tokens, and slots of the trainer's choice."""
    if device != "cpu":
        yield from workload("grpo/256", device, 256)


@benchmark
def long(device):
    """The same for at most 1024 tokens, in the slots that cost no steps."""
    if device != "cpu":
        from infsampling.scheduling import free_slots

        slots = -(-free_slots([n - 1 for n in lengths(1024)]) // 8) * 8
        yield from workload("grpo/1024", device, 1024, slots)
