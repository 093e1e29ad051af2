"""A step of SAM by its trainer, beside two steps of the stock trainer.

Both are two forward and backward passes. What SAM adds is the norm, a copy of the weights, the move
and the way back; the stock trainer steps, clips and fetches data twice instead of once. Beside
them is SAM as it is usually written, in a loop over parameters.

Layers of SmolLM2-135M's shape on a GPU, with random weights: they prove time, and nothing of a
model.
"""

import tempfile
import time

import torch
from shared_kernels.bench import Arm, Workload, benchmark
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

RHO, LR = 0.05, 1e-6
#: Steps of SAM that a call times, behind one that it does not.
STEPS = 4


class Recipe(Trainer):
    """SAM with a loop over parameters, for steps of one batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        before = []
        with torch.no_grad():
            moving = [p for p in model.parameters() if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in moving]).norm()
            for p in moving:
                before.append(p.clone())
                p.add_(p.grad * (RHO / (norm + 1e-12)))
                p.grad = None
        super().training_step(model, inputs, num_items_in_batch)
        with torch.no_grad():
            for p, old in zip(moving, before, strict=True):
                p.copy_(old)
        return loss


class Clock(TrainerCallback):
    """The seconds between the ends of two steps."""

    def __init__(self, first, last):
        self.ends, self.at = (first, last), {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.ends:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.at[state.global_step] = time.perf_counter()

    @property
    def seconds(self):
        first, last = self.ends
        return self.at[last] - self.at[first]


def model_of(device, layers=None, dtype=torch.float32):
    shape = (
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        if device == "cuda"
        else {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    )  # fmt: skip
    if layers is not None:
        shape["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048)).to(dtype)


def trained(kind, model, data, folder, device, size, steps, clock=None, lr=LR, **more):
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=size, learning_rate=lr, optim="sgd",
        optim_args="momentum=0.9", lr_scheduler_type="constant", logging_strategy="no",
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device == "cpu",
        bf16=device == "cuda",
    )  # fmt: skip
    callbacks = [] if clock is None else [clock]
    kind(model, args, train_dataset=data, callbacks=callbacks, **more).train()


@benchmark
def step(device):
    """Language models, eight texts of 512 tokens on a GPU, in bfloat16 over float32 weights."""
    from sam_if.config import SAMConfig
    from sam_if.trainer import SAMTrainer

    size, length = (8, 512) if device == "cuda" else (4, 128)
    model = model_of(device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (size * 8, length), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    place = tempfile.TemporaryDirectory()
    sam = {"sam": SAMConfig(rho=RHO)}

    def timed(kind, times, **more):
        def run():
            clock = Clock(times, times * (1 + STEPS))
            trained(kind, model, data, place.name, device, size, clock.ends[1], clock, **more)
            return clock.seconds / STEPS

        return run

    def check():
        """Both ways of SAM learn the same, and not what the stock trainer does."""
        made = [model_of(device, 2) for _ in range(3)]
        kinds = ((SAMTrainer, sam), (Recipe, {}), (Trainer, {}))
        for twin, (kind, more) in zip(made, kinds, strict=True):
            trained(kind, twin, data, place.name, device, size, 2, lr=1.0, **more)
        ours, theirs, stock = (torch.cat([p.flatten() for p in m.parameters()]) for m in made)
        apart = torch.linalg.vector_norm(ours - theirs)
        assert apart < 0.05 * torch.linalg.vector_norm(ours - stock)

    count = sum(p.numel() for p in model.parameters())
    # forward and backward, twice
    work = {"flops": 12 * count * size * length,
            "flops_dtype": "bf16" if device == "cuda" else "fp32"}  # fmt: skip
    yield Workload(
        name="trainer/llama", device=device, check=check, baseline="two steps of Trainer",
        clock="returned",
        params={"parameters": count, "batch": size, "tokens": length, "optim": "sgd, momentum 0.9",
                "max_grad_norm": 1.0, "weights": "random", "steps of a call": STEPS},
        arms=[Arm(name="two steps of Trainer", fn=timed(Trainer, 2), **work),
              Arm(name="SAMTrainer", fn=timed(SAMTrainer, 1, **sam), **work),
              Arm(name="SAM, a loop over parameters", fn=timed(Recipe, 1), **work)],
    )  # fmt: skip
    place.cleanup()
