"""Training by the command line: rows and a reward in, a model out."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import check_range, message
from tqdm.auto import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Settings of a run; see ``infsampling train --help``."""

    steps: int
    group: int
    batch: int
    accumulate: int
    max_new: int
    max_slots: int | None
    temperature: float
    lr: float
    schedule: str
    beta: float
    loss: str
    lora: int | None
    save_steps: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "group", "batch", "accumulate", "max_new", "save_steps"):
            check_range(
                f"--{name.replace('_', '-')}", getattr(self, name), 1, 1 << 31, "see --help"
            )
        if self.lora is not None:
            check_range("--lora", self.lora, 1, 1 << 16, "or leave it out")
            if importlib.util.find_spec("peft") is None:
                raise ImportError("--lora needs peft; pip install peft")


def load_reward(name: str) -> Callable[..., Any]:
    """Import a function by ``module:name`` or ``file.py:name``.

    Raises:
        ValueError: There is none.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(message("--reward", "module:name or file.py:name", name, "see --help"))
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ValueError(message("--reward", "a file that exists", place, "check the path"))
        spec = importlib.util.spec_from_file_location("infsampling_reward", place)
        if spec is None or spec.loader is None:
            raise ValueError(message("--reward", "a Python file", place, "check the path"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(message("--reward", "a module", place, str(error))) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(message("--reward", f"a function in {place}", attribute, "check its name"))
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, each an object with a prompt.

    Raises:
        ValueError: Naming the first line that is none.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not row.get("prompt"):
            raise ValueError(
                f"--data: line {number} of {path}: expected an object with a prompt, such as "
                f'{{"prompt": "a text"}}, got {line[:60]!r}'
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"--data: expected at least one line in {path}")
    return rows


class _Bar(TrainerCallback):
    """A progress bar with the newest reward, on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "reward" in (logs or {}):
            self.bar.set_postfix(reward=f"{logs['reward']:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def run(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    reward: Callable[..., Any],
    lesson: Lesson,
    out: Path,
    *,
    on_cpu: bool,
) -> list[dict[str, float]]:
    """Train, from the last checkpoint if there is one, save, and return what was logged."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.trainer_utils import get_last_checkpoint

    from infsampling.trainer import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(out), max_steps=lesson.steps, num_generations=lesson.group,
        per_device_train_batch_size=lesson.batch,
        gradient_accumulation_steps=lesson.accumulate, max_completion_length=lesson.max_new,
        max_slots=lesson.max_slots, temperature=lesson.temperature, learning_rate=lesson.lr,
        lr_scheduler_type=lesson.schedule, beta=lesson.beta, loss_type=lesson.loss,
        save_steps=lesson.save_steps, seed=lesson.seed, logging_steps=1, report_to=[],
        use_cpu=on_cpu,
    )  # fmt: skip
    need = args.prompts_per_step
    # fewer rows than a step has prompts are gone through several times
    rows = rows * -(-need // len(rows))
    adapters = None
    if lesson.lora is not None:
        from peft import LoraConfig

        adapters = LoraConfig(r=lesson.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model, reward, args, rows, processing_class=tokenizer, peft_config=adapters
    )
    # the stock ones write to standard output, where the result goes
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(_Bar())
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(out))
    return [line for line in trainer.state.log_history if "reward" in line]
