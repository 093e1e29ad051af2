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
COUNT, PROMPT, LONGEST, MICRO = 64, 256, 256, 8


def lengths():
    found = np.concatenate(list(json.loads(MEASURED.read_text())["groups"]))
    drawn = np.random.default_rng(0).choice(found, COUNT)
    return np.maximum(1, np.ceil(drawn * LONGEST / 512)).astype(int).tolist()


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


def settings(folder):
    return {
        "output_dir": folder, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": COUNT // MICRO, "num_generations": COUNT,
        "max_completion_length": LONGEST, "max_steps": 1, "report_to": [], "save_strategy": "no",
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


def trl_trainer(device, folder, forced):
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
        model=model, reward_funcs=reward, args=trl.GRPOConfig(**settings(folder)),
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in range(10, 266))}]),
        processing_class=make_tokenizer(), callbacks=[watch],
    )  # fmt: skip
    return made, watch


def our_trainer(device, folder, forced):
    from infsampling import GRPOConfig, GRPOTrainer

    watch = stopwatch()
    made = GRPOTrainer(
        model=make_model(device), reward_funcs=reward, args=GRPOConfig(**settings(folder)),
        train_dataset=[{"prompt": " ".join(f"w{i}" for i in range(10, 266))}],
        processing_class=make_tokenizer(), callbacks=[watch],
    )  # fmt: skip
    plain = made.sampler.generate
    made.sampler.generate = lambda *args, **kwargs: plain(*args, forced_lengths=forced, **kwargs)
    return made, watch


@benchmark
def step(device):
    """Sample, reward, learn: one optimizer step."""
    if device == "cpu":
        return
    forced = lengths()
    with tempfile.TemporaryDirectory() as folder:
        makers = {"TRL": trl_trainer, "infsampling": our_trainer}
        peaks, trainers = {}, {}
        for name, make in makers.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trainers[name] = make(device, folder, forced)
            trainers[name][0].train()
            peaks[name] = torch.cuda.max_memory_allocated() - before

        def run(name):
            made, watch = trainers[name]
            made.train()
            return watch.seconds

        def check():
            for made, _ in trainers.values():
                logged = [line for line in made.state.log_history if "reward" in line][-1]
                mean = logged["completions/mean_length"]
                assert abs(mean - sum(forced) / COUNT) < 1e-3, logged

        yield Workload(
            name="grpo/64", device=device, check=check, baseline="TRL", clock="returned",
            params={"samples": COUNT, "prompt": PROMPT, "longest": max(forced),
                    "tokens": sum(forced), "micro_batch": MICRO, "shape": "Qwen3-0.6B",
                    "peak_bytes": peaks},
            arms=[Arm(name=name, fn=lambda name=name: run(name)) for name in trainers],
        )  # fmt: skip
