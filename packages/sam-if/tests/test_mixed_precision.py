"""Trainers that take the steps of SAM in float16 and bfloat16, on a CPU."""

import copy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from sam_if.config import SAMConfig
from sam_if.trainer import SAMTrainer
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from test_trainer import (
    Net,
    by_hand,
    mean_losses,
    options,
    rows,
    same,
    stacked,
    told,
    trained,
    windows,
)


class Counting(torch.amp.GradScaler):
    """Counts what is asked of it."""

    def __init__(self, **more):
        super().__init__("cpu", **({"init_scale": 2.0**10} | more))
        self.asked = Counter()

    def unscale_(self, *args):
        self.asked["unscale"] += 1
        super().unscale_(*args)

    def update(self, *args):
        self.asked["update"] += 1
        super().update(*args)


@pytest.fixture
def half(monkeypatch):
    """Have accelerate compute in float16 on a CPU, as it does on a GPU."""

    def set_up(trainer, **more):
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = Counting(**more)

    return set_up


def scaled(trainer):
    trainer.accelerator.scaler = Counting()


@pytest.mark.parametrize("scope", ["global", "per_rank", "per_microbatch"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_scaler_changes_nothing(optim, scope, tmp_path):
    """Its scales are powers of two, and it sees one gradient of each step."""
    models, data = [Net(torch.float32), Net(torch.float32)], rows(32, torch.float32)
    made = []
    for model, before in zip(models, (scaled, None), strict=True):
        config = SAMConfig(rho=0.3, scope=scope)
        made.append(trained(tmp_path, model, data, config, before=before, optim=optim,
                            optim_args=None, gradient_accumulation_steps=2))  # fmt: skip
    same(*models, 1e-6)
    assert told(made[0]) == pytest.approx(told(made[1]), rel=1e-6)
    asked = made[0].accelerator.scaler.asked
    # fused optimizers unscale inside their step
    assert asked == Counter(update=6) + Counter(unscale=0 if optim.endswith("fused") else 6)


def test_decay_is_not_scaled(tmp_path):
    models, data = [Net(torch.float32), Net(torch.float32)], rows(32, torch.float32)
    for model, before in zip(models, (scaled, None), strict=True):
        made = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        config = SAMConfig(rho=0.5, perturb_decay=True)
        trained(tmp_path, model, data, config, before=before, optimizers=(made, None))
    same(*models, 1e-6)


#: Forwards that overflow: of the second step, in one batch of its two, in either pass.
SPOILT = {("global", 1): 6, ("global", 2): 7, ("per_rank", 1): 5,
          ("per_microbatch", 1): 5, ("per_microbatch", 2): 6}  # fmt: skip


@pytest.mark.parametrize(("scope", "turn"), SPOILT)
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_step_that_overflows_is_skipped(optim, scope, turn, tmp_path):
    data, kept = rows(48, torch.float32), []
    model = Net(torch.float32, spoilt=(SPOILT[scope, turn],), norm=torch.nn.BatchNorm1d(8))

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            base = copy.deepcopy(optimizer.state_dict()["state"])
            weights = [p.detach().clone() for p in model.parameters()]
            kept.append((weights, base, scaler().get_scale()))

    def scaler():
        return trainer.accelerator.scaler

    trainer = SAMTrainer(
        model, options(tmp_path, optim=optim, optim_args=None, max_steps=3,
                       gradient_accumulation_steps=2),
        train_dataset=data, sam=SAMConfig(rho=0.3, scope=scope, bn="both"), callbacks=[Seen()],
    )  # fmt: skip
    scaled(trainer)
    trainer.train()
    (one, state, before), (two, again, after), (three, _, last) = kept
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(two, three, strict=True))
    assert all(torch.isfinite(p).all() for p in three)
    assert (before, after, last) == (1024.0, 512.0, 512.0)
    for number, values in state.items():
        for name, value in values.items():
            assert torch.equal(value, again[number][name]), name
    assert scaler().asked["update"] == 3
    assert torch.isfinite(model.norm.running_mean).all()


def test_half_precision_backs_off_until_it_fits(half, tmp_path):
    """Real float16: gradients overflow at the first scale, and clipping sees unscaled ones."""
    data = rows(32, torch.float32)
    model, wide = Net(torch.float32), Net(torch.float32)
    trainer = SAMTrainer(
        model, options(tmp_path, max_grad_norm=0.1, max_steps=30, learning_rate=0.05),
        train_dataset=data, sam=SAMConfig(rho=0.3),
    )  # fmt: skip
    half(trainer, init_scale=2.0**26)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    skipped = sum(not np.isfinite(norm) for norm in told(trainer, "grad_norm"))
    assert 3 < skipped < 20
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (26 - skipped)
    assert trainer.accelerator.scaler.asked == Counter(update=30, unscale=30)
    assert not torch.equal(model.last.weight, before["last.weight"])
    # steps that were skipped do not count for the schedule; what is left is as in float32
    data = data[skipped % 4 * 8 :] + data[: skipped % 4 * 8]
    made = torch.optim.SGD(wide.parameters(), lr=0.05, momentum=0.9)
    losses = mean_losses(wide, data, steps=30 - skipped)
    by_hand(wide, made, losses, 0.3, clip=0.1, factor=lambda t: 1 - t / 30)
    same(model, wide, 5e-3)


def test_bfloat16_autocast(tmp_path):
    model, twin, data = Net(torch.float32), Net(torch.float32), rows(32, torch.float32)
    trained(tmp_path, model, data, SAMConfig(rho=0.3), bf16=True)

    def loss(part):
        with torch.autocast("cpu", torch.bfloat16):
            return twin(**stacked(part))["loss"]

    losses = [lambda part=part: loss(part) for part in windows(data, 8, 6)]
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), losses, 0.3)
    same(model, twin, 1e-6)
