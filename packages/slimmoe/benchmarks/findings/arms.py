"""The arms of the comparisons: what each changes, and how one is carried out."""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from shared_kernels._checks import message
from shared_kernels.files import write_text
from slimmoe import CompressionConfig, compress
from slimmoe.calibration import CalibrationStatistics, calibrate
from slimmoe.distillation import DistillationArguments, DistillationTrainer, Teacher
from slimmoe.mtp import MTPHead
from slimmoe.progressive import ProgressiveRunner, ProgressiveSchedule
from slimmoe.summary import sizes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from findings import data as texts
from findings.data import BLOCK
from findings.evaluation import block_losses, evaluate
from findings.model import MasterAdamW, dtype_on, fresh

if TYPE_CHECKING:
    from slimmoe.progressive import Stage

    from findings.data import Data

#: Half of the experts, three quarters of layers and channels, three experts of each token.
TARGET = CompressionConfig(
    num_layers=6, hidden_size=384, num_experts=16, num_experts_per_tok=3,
    expert_method="partial_merge", importance="soft", similarity="router_weight",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to a student.

    Attributes:
        method: How experts go.
        importance: By which.
        start: ``pruned`` or ``random``, of the same shape.
        kd: Weight of distillation at the begin and at the end.
        mtp: Weight of the module of MTP.
        mtp_kd: Weight of distillation in it, if another.
        schedule: Of `ProgressiveSchedule`.
    """

    method: str = "partial_merge"
    importance: str = "soft"
    start: str = "pruned"
    kd: tuple[float, float] = (1.0, 0.75)
    mtp: tuple[float, float] = (0.3, 0.1)
    mtp_kd: tuple[float, float] | None = None
    schedule: str = "one_shot"


BASE = Arm()
ARMS = {
    "base": BASE,
    "random": Arm(start="random"),
    "pruned-lm": Arm(kd=(0.0, 0.0)),
    **{
        f"{importance}-{method}": Arm(method=method, importance=importance)
        for importance in ("freq", "soft", "reap")
        for method in ("prune", "merge", "partial_merge")
        if (importance, method) != (BASE.importance, BASE.method)
    },
    "kd-to-1": Arm(kd=(1.0, 1.0)),
    "kd-to-0.5": Arm(kd=(1.0, 0.5)),
    "kd-to-0": Arm(kd=(1.0, 0.0)),
    "mtp-lm": Arm(mtp_kd=(0.0, 0.0)),
    "no-mtp": Arm(mtp=(0.0, 0.0)),
    **{name: Arm(schedule=name) for name in ("depth_first", "width_first", "joint")},
}


class Blocks(torch.utils.data.Dataset):
    """Blocks as a Trainer takes them, in an order of a seed, the same for all arms."""

    def __init__(self, data: Data, count: int, seed: int) -> None:
        if count > len(data.train):
            remedy = "give fewer tokens, or more texts"
            raise ValueError(message("tokens", f"{len(data.train)} blocks at most", count, remedy))
        draws = torch.Generator().manual_seed(1000 + seed)
        self._rows = torch.randperm(len(data.train), generator=draws)[:count]
        self._train = data.train

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = self._train[self._rows[number]].long()
        return {"input_ids": ids}


class _Curve(TrainerCallback):
    """Keeps losses of some blocks while training."""

    def __init__(self, data: Data, before: int, batch: int, every: int) -> None:
        self._blocks, self._before, self._batch, self._every = data.curve, before, batch, every
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            tokens = self._before + state.global_step * self._batch * BLOCK
            self.points.append((tokens, block_losses(model, self._blocks).mean().item()))
            model.train()


def run_arm(
    name: str, seed: int, teacher: Any, folder: str | Path, data: Data, out: str | Path, *,
    tokens: int, batch: int, rate: float, calibration: int, target: CompressionConfig = TARGET,
) -> None:  # fmt: skip
    """Make a student, train it, ask it, and write what was found; nothing where it is written.

    Args:
        name: Of `ARMS`.
        seed: Of the order of data, of what is calibrated on, and of random weights.
        teacher: The model, on its device.
        folder: Of the teacher.
        data: Blocks and questions.
        out: For ``NAME-SEED.json`` and losses of test blocks in ``NAME-SEED.safetensors``.
        tokens: Of training.
        batch: Blocks of a step.
        rate: Of learning at its highest.
        calibration: Blocks that are calibrated on.
        target: Sizes of students.
    """
    arm, out = ARMS[name], Path(out)
    record, begin = out / f"{name}-{seed}.json", time.monotonic()
    if record.is_file():
        return
    device = str(teacher.device)
    place = out / "students" / f"{name}-{seed}"
    shutil.rmtree(place, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(data.folder)
    options = dataclasses.replace(
        target, expert_method=arm.method, importance=arm.importance,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(2000 + seed)
    chosen = torch.randperm(len(data.train), generator=draws)[:calibration]
    sample = [data.train[row].long().tolist() for row in chosen]
    curve: list[tuple[int, float]] = []
    first: dict[str, Any] = {}
    rows = Blocks(data, tokens // BLOCK, seed)

    def train(student: Path, stage: Stage, run: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype_on(device))
        head = MTPHead.from_pretrained(student, model)
        if arm.start == "random":
            model, head = fresh(model.config, seed, device)
        model.to(device)
        if not first:
            losses = block_losses(model, data.test)
            first.update(loss=losses.mean().item(), losses=losses)
        begins, ends = (round(share * len(rows)) for share in stage.span)
        steps = (ends - begins) // batch
        args = DistillationArguments(
            str(run), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
            kd_weight=arm.kd, mtp_weight=arm.mtp, mtp_kd_weight=arm.mtp_kd,
            router_aux_loss_coef=0.0,
            schedule_span=stage.span, warmup_steps=max(1, len(rows) // batch // 20),
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.075},
            weight_decay=0.1, adam_beta2=0.95, save_strategy="no", report_to="none",
            logging_steps=max(1, steps // 10), disable_tqdm=True, seed=seed,
            dataloader_num_workers=0, use_cpu=device == "cpu",
        )  # fmt: skip
        counted = _Curve(data, begins * BLOCK, batch, max(1, len(rows) // batch // 16))
        trainer = DistillationTrainer(
            model, teacher, args, mtp=head,
            train_dataset=torch.utils.data.Subset(rows, range(begins, ends)),
            optimizer_cls_and_kwargs=(MasterAdamW, {
                "lr": rate, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": device != "cpu",
            }), callbacks=[counted],
        )  # fmt: skip
        trainer.train()
        curve.extend(counted.points)
        trainer.save_model(str(run / "final"))
        tokenizer.save_pretrained(run / "final")

    schedule = _schedule(arm, folder, options, tokens)
    if len(schedule.stages) == 1:
        # all arms of a seed are compressed by the same statistics
        kept = out / f"statistics-{seed}"
        with FileLock(f"{kept}.lock"):
            if not kept.is_dir():
                calibrate(folder, sample, device=device, batch_tokens=32 * BLOCK,
                          progress=False).save_pretrained(kept)  # fmt: skip
        statistics = CalibrationStatistics.from_pretrained(kept)
        compress(folder, place / "student", options, statistics=statistics, progress=False)
        train(place / "student", schedule.stages[0], place / "run")
        final = place / "run" / "final"
    else:
        final = ProgressiveRunner(schedule, train).run(
            folder, place, sample, progress=False, device=device, batch_tokens=32 * BLOCK,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(final, dtype=dtype_on(device)).to(device)
    found = evaluate(model, MTPHead.from_pretrained(final, model), data, tokenizer)
    tensors = {"first": first["losses"], "losses": found.pop("losses")}
    tensors |= {kind: found.pop(f"{kind}_right") for kind in data.questions}
    save_file(tensors, out / f"{name}-{seed}.safetensors")
    told = {
        "arm": name, "seed": seed, "tokens": tokens, "first_loss": first["loss"], "curve": curve,
        "seconds": time.monotonic() - begin, **found,
    }  # fmt: skip
    write_text(record, json.dumps(told, indent=1) + "\n")
    shutil.rmtree(place)


def _schedule(
    arm: Arm, folder: str | Path, options: CompressionConfig, tokens: int
) -> ProgressiveSchedule:
    """Return stages: a tenth of all tokens in the first of two, as in the paper."""
    parts = (tokens,) if arm.schedule == "one_shot" else (tokens // 10, tokens - tokens // 10)
    return ProgressiveSchedule.make(arm.schedule, sizes(folder), options, parts)


def work_through(device: str, jobs: Any, work: Path, options: dict[str, Any], until: float) -> None:
    """Carry out arms of a queue, in a process of its own, until a time.

    Args:
        device: Of it.
        jobs: Of names and seeds.
        work: Folder with data and a teacher.
        options: Of `run_arm`; ``target`` as what differs from `TARGET`.
        until: Of ``time.time``, after which no other is begun.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device != "cpu":
        torch.cuda.set_device(device)
    options = options | {"target": dataclasses.replace(TARGET, **options["target"])}
    data = texts.load(work / "data")
    teacher = Teacher.from_pretrained(work / "teacher", dtype=dtype_on(device)).model.to(device)
    out = work / "runs"
    while time.time() < until:
        try:
            name, seed = jobs.get(timeout=1)
        except queue.Empty:
            return
        begin = time.monotonic()
        run_arm(name, seed, teacher, work / "teacher", data, out, **options)
        print(f"{device} {name}-{seed}: {time.monotonic() - begin:.0f} s", flush=True)
