"""One private training step against the same step without privacy, and against Opacus.

A step is a logical batch of several physical ones: forward and backward of each, then the noise,
AdamW, and empty gradients. The step without privacy is the same model, loss and optimizer with
ordinary gradient accumulation.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path

import torch
from shared_kernels.bench import Arm, Workload, benchmark

sys.path.insert(0, str(Path(__file__).parent))
import shapes

LR, CLIP, SIGMA = 1e-6, 1.0, 1.0
#: Tokens of a physical batch on a GPU, and physical batches of a logical one.
TOKENS, PHYSICAL = 16384, 4


@benchmark
def llama(device):
    """Shapes of one and eight (a quarter of the layers) billion parameters in bfloat16."""
    if device != "cpu":
        for name, layers, tokens in (
            ("llama-1b", None, 512),
            ("llama-1b", None, 2048),
            ("llama-8b", 8, 512),
            ("llama-8b", 8, 4096),
        ):
            yield _private(device, name, layers, tokens)


@benchmark
def lengths(device):
    """The lengths at which another strategy takes over."""
    if device != "cpu":
        for tokens in (256, 1024, 4096):
            yield _private(device, "llama-1b", None, tokens)


@benchmark
def lora(device):
    """Adapters of rank 16 on every matrix of the decoder."""
    if device != "cpu":
        yield _private(device, "llama-8b", 8, 512, rank=16)


@benchmark
def peers(device):
    """Opacus, which takes no tied weights: head and embedding are two matrices in every arm."""
    if importlib.util.find_spec("opacus") is None:
        raise ModuleNotFoundError("expected opacus beside us: pip install opacus")
    if device == "cpu":
        yield _peers(device, "smollm2-135m", 30, 8, 128)
    else:
        for rows, tokens in ((16, 512), (4, 2048)):
            yield _peers(device, "llama-1b", 16, rows, tokens)


class _Arms:
    """Arms with what each holds on the device: weights, optimizer, and the peak of a step."""

    def __init__(self, device):
        self.cuda, self.arms, self.memory = device != "cpu", [], {}

    def add(self, name, build):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
        try:
            step = build()
            for _ in range(2):
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                step()
        except torch.OutOfMemoryError:
            self.memory[f"{name}, GPU peak"] = "out of memory"
            return
        if self.cuda:
            torch.cuda.synchronize()
            self.memory[f"{name}, GPU peak"] = torch.cuda.max_memory_allocated() - before
        self.arms.append(Arm(name=name, fn=step))


def _optimizer(model, device):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, fused=device != "cpu")


def _ordinary(model, data, device):
    optimizer = _optimizer(model, device)

    def step():
        for batch in data:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _flashdp(model, data, device, **options):
    from flashdp import PrivacyEngine

    engine, optimizer = PrivacyEngine(), _optimizer(model, device)
    rows = sum(len(batch["input_ids"]) for batch in data)
    options = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP} | options
    engine.make_private(model, optimizer, expected_batch_size=rows, **options)

    def step():
        for index, batch in enumerate(data, 1):
            model(**batch, dp_last=index == len(data)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step.engine = engine
    return step


def _gate(name, device, dtype, tokens, tied=None):
    """Without clipping and noise the sums are the ordinary gradient, on one layer of the shape."""

    def check():
        data = shapes.batches(2, min(tokens, 512), 1, vocabulary=1000, device=device)
        ours, plain = (
            shapes.llama(name, layers=1, tied=tied, dtype=dtype, device=device) for _ in range(2)
        )
        plain.load_state_dict(ours.state_dict())
        options = {"noise_multiplier": 0.0, "max_grad_norm": float("inf")}
        engine = _flashdp(ours, data, device, **options).engine
        ours(**data[0]).loss.backward()
        engine._before_step()
        plain(**data[0]).loss.backward()
        bound = 2e-2 if dtype is torch.bfloat16 else 1e-4
        expected = dict(plain.named_parameters())
        for key, param in ours.named_parameters():
            # The mean over equally long units is the mean over tokens.
            want = expected[key].grad.float()
            error = (param.grad.float() - want).norm() / want.norm()
            assert error < bound, f"{key}: {error:.2e}"

    return check


def _private(device, name, layers, tokens, rank=None):
    dtype, rows = torch.bfloat16, TOKENS // tokens
    data = shapes.batches(rows, tokens, PHYSICAL, vocabulary=128000, device=device)
    arms = _Arms(device)

    def model():
        made = shapes.llama(name, layers=layers, dtype=dtype, device=device)
        if rank:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
            made = get_peft_model(made, config).to(dtype)
        return made

    arms.add("without privacy", lambda: _ordinary(model(), data, device))
    arms.add("flashdp", lambda: _flashdp(model(), data, device))
    size = sum(p.numel() for p in shapes.llama(name, layers=layers, device="meta").parameters())
    kind = f" LoRA {rank}" if rank else ""
    return Workload(
        name=f"{name}{kind}/{tokens} tokens",
        params={
            "parameters": size,
            "layers": layers or shapes.SHAPES[name][4],
            "rows": rows,
            "tokens": tokens,
            "physical batches": PHYSICAL,
            "dtype": str(dtype),
            **arms.memory,
        },
        device=device,
        clock="wall",
        baseline="without privacy",
        check=_gate(name, device, dtype, tokens),
        arms=arms.arms,
    )


def _opacus(model, data, device, mode):
    """Opacus's engine without its sampler: hooks clip per layer, ghost clipping is flat."""
    from flashdp import per_sample_loss
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping, DPPerLayerOptimizer
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    rows = sum(len(batch["input_ids"]) for batch in data)
    options = {
        "noise_multiplier": SIGMA, "expected_batch_size": rows, "loss_reduction": "sum"
    }  # fmt: skip
    if mode == "hooks":
        wrapped = GradSampleModule(model, loss_reduction="sum")
        count = sum(p.requires_grad for p in model.parameters())
        optimizer = DPPerLayerOptimizer(
            _optimizer(wrapped, device), max_grad_norm=[CLIP / count**0.5] * count, **options
        )
    else:
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="sum"
        )
        optimizer = DPOptimizerFastGradientClipping(
            _optimizer(wrapped, device), max_grad_norm=CLIP, **options
        )

        def criterion(logits, labels):
            return per_sample_loss(logits, labels)

        criterion.reduction = "sum"
        loss_of = DPLossFastGradientClipping(wrapped, optimizer, criterion, loss_reduction="sum")
    (batch,) = data
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]

    def step():
        logits = wrapped(input_ids=ids).logits[:, :-1]
        if mode == "hooks":
            per_sample_loss(logits, labels).sum().backward()
        else:
            loss_of(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peers(device, name, layers, rows, tokens):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    data = shapes.batches(rows, tokens, 1, vocabulary=49000, device=device)
    arms = _Arms(device)

    def model():
        return shapes.llama(name, layers=layers, tied=False, dtype=dtype, device=device)

    arms.add("without privacy", lambda: _ordinary(model(), data, device))
    arms.add("flashdp", lambda: _flashdp(model(), data, device))
    arms.add("flashdp, flat", lambda: _flashdp(model(), data, device, grouping="flat"))
    arms.add("Opacus ghost, flat", lambda: _opacus(model(), data, device, "ghost"))
    arms.add("Opacus hooks, per layer", lambda: _opacus(model(), data, device, "hooks"))
    size = sum(
        p.numel() for p in shapes.llama(name, layers=layers, tied=False, device="meta").parameters()
    )
    return Workload(
        name=f"{name} untied/{rows} x {tokens} tokens",
        params={
            "parameters": size,
            "layers": layers,
            "rows": rows,
            "tokens": tokens,
            "physical batches": 1,
            "dtype": str(dtype),
            **arms.memory,
        },
        device=device,
        clock="wall",
        baseline="without privacy",
        check=_gate(name, device, dtype, tokens, tied=False),
        arms=arms.arms,
    )
