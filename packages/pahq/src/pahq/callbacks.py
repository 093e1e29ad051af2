"""A circuit that is watched while its model is trained by a Trainer of transformers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message
from shared_kernels.files import write_text
from transformers import TrainerCallback
from transformers.utils import logging

from pahq.ablation import ABLATIONS
from pahq.circuit import Circuit
from pahq.errors import ResumeError, UnsupportedModelError
from pahq.evaluation.runs import check_graph
from pahq.finder import CircuitFinder

if TYPE_CHECKING:
    from collections.abc import Generator

    from transformers import Trainer

    from pahq.tasks import Task

_logger = logging.get_logger(__name__)


class CircuitCallback(TrainerCallback):
    """Measures during training how far a circuit is still that of the model.

    It is measured before the first step, every ``every`` steps and after the last one, on the
    weights of that step, in evaluation mode, on the main process; training goes on as it would
    without. What is logged, and kept in `history` without the name:

    - ``circuit/kl``: mean KL divergence of the circuit's distribution from the model's, nats.
    - ``circuit/recovered``: share of the model's difference of logits that the circuit recovers, as
      `CircuitFinder.evaluate` computes it; NaN if the model tells clean and corrupted prompts not
      apart. Only of tasks with wrong answers.
    - ``circuit/jaccard``: with ``attribution``, the share of edges that are in both the circuit and
      as many that EAP-IG ranks highest now; NaN if it cannot rank as many.

    A Trainer does not tell its callbacks how to log. With ``trainer`` values go to its reporters::

        trainer.add_callback(CircuitCallback(circuit, task, every=50, trainer=trainer))

    Without, as in ``Trainer(..., callbacks=[CircuitCallback(circuit, task)])``, they are in
    ``state.log_history`` only. Either way they are written to ``circuit_history.json`` in the
    output folder after each measurement, from where a training goes on that is resumed.

    A measurement costs three runs of all pairs of the task, whose senders' outputs
    ``(S, N, T, D)`` must fit beside the training, twice; ``attribution`` two runs and ``ig_steps``
    backward passes more.

    Args:
        circuit: Of the model.
        task: N pairs.
        every: Steps between measurements.
        ablation: What absent edges carry, one of `pahq.ABLATIONS`.
        attribution: Whether to look for the circuit again, by EAP-IG of the difference of logits,
            or of KL where there are no wrong answers.
        ig_steps: Of EAP-IG.
        name: What logged values and the file begin with; tell two circuits of one training apart.
        trainer: That it is added to.

    Attributes:
        history: What was measured, a dict with the ``step`` for each.

    Raises:
        TypeError: Something else than a circuit.
        ValueError: A number of steps below 1, another ablation, or a name that is not of letters,
            digits, dots and hyphens. When training begins: a circuit of another model.
        UnsupportedModelError: When training begins: weights that are sharded, adapters that are
            not merged, or a model that `CircuitFinder` refuses. In mixed precision its logits are
            not compared, for those of a Trainer's model are rounded.
        ResumeError: When training is resumed: the file is of another circuit, task or setting, or
            damaged.
    """

    def __init__(
        self,
        circuit: Circuit,
        task: Task,
        *,
        every: int = 100,
        ablation: str = "patch",
        attribution: bool = False,
        ig_steps: int = 5,
        name: str = "circuit",
        trainer: Trainer | None = None,
    ) -> None:
        if not isinstance(circuit, Circuit):
            raise TypeError(message("circuit", "a Circuit", circuit, "see CircuitFinder.acdc"))
        check_range("every", every, 1, 1 << 31, "steps of training")
        check_range("ig_steps", ig_steps, 1, 1 << 20, "a gradient is of a point")
        check_choice("ablation", ablation, ABLATIONS)
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(message("name", "letters, digits, . and -", name, "it names a file"))
        self.circuit, self.task, self.every, self.ablation = circuit, task, every, ablation
        self.attribution, self.ig_steps = attribution, ig_steps
        self.name, self.trainer = name, trainer
        self.history: list[dict[str, float]] = []

    # --- events ------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Refuse what cannot be measured, on every process; go on, or measure."""
        whole = _whole(kwargs["model"])
        with _evaluating(whole):
            finder = self._finder(whole, check=not (args.bf16 or args.fp16))
        check_graph("circuit", self.circuit, finder.graph)
        self.history = []
        if not state.is_world_process_zero:
            return control
        if self.trainer is None and args.report_to:
            _logger.warning(
                f"{self.name}: {', '.join(args.report_to)} will not get its values; add it by "
                "trainer.add_callback(CircuitCallback(..., trainer=trainer))"
            )
        if state.global_step:
            self.history = self._written(self._file(args), state.global_step)
            return control
        return self._measure(args, state, control, whole)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Measure every so many steps, and after the last."""
        if state.global_step % self.every == 0 or control.should_training_stop:
            return self._measure(args, state, control, kwargs["model"])
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Measure where training was stopped after the end of a step."""
        if control.should_training_stop:
            return self._measure(args, state, control, kwargs["model"])
        return control

    # --- measurements --------------------------------------------------------------------------

    def _finder(self, model: Any, *, check: bool) -> CircuitFinder:
        graph = self.circuit.graph
        own = graph.key_heads == graph.heads
        return CircuitFinder(model, kv="per_query_head" if own else "grouped", check=check)

    def _measure(self, args: Any, state: Any, control: Any, model: Any) -> Any:
        if not state.is_world_process_zero:
            return control
        if self.history and self.history[-1]["step"] == state.global_step:
            return control
        whole = _whole(model)
        with _evaluating(whole):
            values = self._values(self._finder(whole, check=False))
        self.history.append({"step": state.global_step, **values})
        self._write(self._file(args))
        logs = {f"{self.name}/{key}": value for key, value in values.items()}
        if self.trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
            return control
        from transformers import Trainer

        # to have logged clears what tells the Trainer to log the loss of this step; a subclass's
        # log, as those of TRL, adds and forgets the averages it has gathered for that
        due = control.should_log
        Trainer.log(self.trainer, logs)
        self.trainer.control.should_log = due
        return self.trainer.control

    def _values(self, finder: CircuitFinder) -> dict[str, float]:
        apart = self.task.wrong_answers is not None
        metrics = ("kl", "logit_diff") if apart else ("kl",)
        found = finder.evaluate(self.circuit, self.task, metrics, ablation=self.ablation)
        values = {"kl": found["kl"]["circuit"]}
        if apart:
            values["recovered"] = found["logit_diff"]["recovered"]
        if self.attribution:
            scored = finder.eap(self.task, metric=metrics[-1], ig_steps=self.ig_steps)
            ranked = int((scored.present & scored.scores.isfinite()).sum())
            values["jaccard"] = float("nan")
            if ranked == finder.graph.edges:
                values["jaccard"] = scored.top(len(self.circuit)).jaccard(self.circuit)
        return values

    # --- files -------------------------------------------------------------------------------

    def _file(self, args: Any) -> Path:
        return Path(args.output_dir) / f"{self.name}_history.json"

    def _settings(self) -> dict[str, Any]:
        edges = repr(self.circuit.graph).encode() + self.circuit.present.numpy().tobytes()
        return {
            "circuit": hashlib.sha256(edges).hexdigest()[:16], "task": self.task.fingerprint,
            "ablation": self.ablation, "ig_steps": self.ig_steps if self.attribution else None,
        }  # fmt: skip

    def _write(self, path: Path) -> None:
        # JSON has no NaN
        rows = [
            {key: value if math.isfinite(value) else None for key, value in row.items()}
            for row in self.history
        ]
        write_text(path, json.dumps({**self._settings(), "history": rows}, indent=1) + "\n")

    def _written(self, path: Path, step: int) -> list[dict[str, float]]:
        """Return what was measured up to a step; nothing where there is no file."""
        if not path.is_file():
            return []
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                {key: float("nan") if value is None else value for key, value in row.items()}
                for row in document["history"] if row["step"] <= step
            ]  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResumeError(f"{path}: expected a history, got {error!r}; remove it") from error
        for key, wanted in self._settings().items():
            if document.get(key) != wanted:
                raise ResumeError(
                    f"{path}: expected one of {key} {wanted!r}, got {document.get(key)!r}; give "
                    "what training began with, or another name"
                )
        return rows


@contextlib.contextmanager
def _evaluating(model: Any) -> Generator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _whole(model: Any) -> Any:
    """Return a model without its wrappers, all of whose weights are on this process.

    Raises:
        UnsupportedModelError: Weights are sharded, or under adapters.
    """
    from accelerate.utils import extract_model_from_parallel

    kinds: tuple[type, ...] = ()
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        kinds = (FullyShardedDataParallel, DTensor)
    parts = [*model.named_modules(), *model.named_parameters()]
    for name, part in parts:
        # DeepSpeed marks the parameters of ZeRO-3
        if isinstance(part, kinds) or hasattr(part, "ds_id"):
            raise UnsupportedModelError(
                f"model: expected weights that are whole on every process, got {name or 'all'} "
                "sharded; use DDP or ZeRO up to stage 2"
            )
    if "peft" in sys.modules:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in model.named_modules():
            if isinstance(module, PeftModel | BaseTunerLayer):
                raise UnsupportedModelError(
                    f"model: expected weights without adapters, got {type(module).__name__} at "
                    f"{name or 'the top'}; train all weights, or measure after merge_and_unload()"
                )
    return extract_model_from_parallel(model, keep_torch_compile=False)
