"""Sharpness-aware minimization inside ``transformers.Trainer``.

The stock trainer keeps data, optimizers, schedules, clipping, logging, evaluation and checkpoints.
When it is about to step, the gradient that it finds is that at the moved weights, and the weights
are back where they were.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

from sam_if.attribution import attribute
from sam_if.config import SAMConfig
from sam_if.conflicts import recorder_for, refused
from sam_if.optim import SAM
from sam_if.passes import RandomState, RunningStatistics, uncounted
from sam_if.recording import MISSING, SAMPLE, FinishCallback, Numbered, NumberedCollator

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer
except ImportError as error:
    raise ImportError(MISSING) from error

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor, nn

    from sam_if.objective import Objective
    from sam_if.recording import Recorder
    from sam_if.scores import Scores

    # what the mixin is mixed into
    _Base = Trainer
else:
    _Base = object


class SAMMixin(_Base):
    """Makes a trainer step by sharpness-aware minimization: ``class X(SAMMixin, SFTTrainer)``.

    A step takes two gradients (arXiv:2010.01412, algorithm 1): the first moves the weights, the
    second is taken there, and is what the trainer clips, logs as ``grad_norm`` and steps by. The
    loss that is logged is that at the weights, of the first pass. Whose gradient moves the weights
    under accumulation and in several processes is `SAMConfig.scope`.

    - The second pass draws what the first drew, so dropout has the same masks in both, and what is
      drawn afterwards is as without SAM.
    - Every optimizer of ``optim`` will do but those that step inside backward. It stays the
      trainer's own; checkpoints hold its state and nothing else, and a run can go on from one that
      was made without SAM.
    - In float16 a gradient scaler sees the second gradient only. Where either is not finite, the
      step is skipped and the scale backs off.
    - Trained are parameters that require gradients, and no others are moved, as with adapters.
    - DDP is supported; weights that are sharded (FSDP, DeepSpeed) are not, nor are trainers that
      generate their own data, such as GRPO's.
    - ``training_step`` runs twice on each batch. What a trainer counts there is counted twice,
      unless it is one of trl's, whose metrics are of the first pass.
    - With ``record`` the run can be asked afterwards what its samples did, see `Trajectory`. Losses
      are then made by the objective, in float32 or float64, in one process, without dropout; under
      accumulation samples count alike, or tokens do.

    Args:
        args: Of the trainer.
        sam: Radius, scope and the like.
        record: A new folder for the record of the run; one that a checkpoint is resumed from goes
            on.
        objective: That is trained by while it is recorded; by default the model's own, for causal
            language models and classifiers of transformers.
        storage: Of the record: ``sqrt`` or ``all``, see `Trajectory`.
        kwargs: Of the trainer.

    Attributes:
        sam: The options.
        sam_optimizer: `SAM` around the trainer's optimizer, once there is one.
        recorder: Of the run; None if it is not recorded.

    Raises:
        TypeError: ``sam`` is something else.
        ValueError: What SAM cannot go together with; the message says what to do instead.
    """

    def __init__(
        self,
        *args: Any,
        sam: SAMConfig | None = None,
        record: str | os.PathLike[str] | None = None,
        objective: Objective | None = None,
        storage: str = "sqrt",
        **kwargs: Any,
    ) -> None:
        if sam is not None and not isinstance(sam, SAMConfig):
            raise TypeError(message("sam", "a SAMConfig", sam, "pass SAMConfig(rho=0.05)"))
        self.sam = SAMConfig() if sam is None else sam
        self.sam_optimizer: SAM | None = None
        self._window: list[tuple[dict[str, Any], RandomState]] = []
        super().__init__(*args, **kwargs)
        refused(self)
        self.recorder: Recorder | None = None
        if record is not None:
            self.recorder = recorder_for(self, record, objective, storage)
            self.add_callback(FinishCallback(self.recorder))
        elif objective is not None:
            remedy = "give record=, or leave it out"
            raise ValueError(message("objective", "None without record", objective, remedy))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the trainer's optimizer, and SAM around it."""
        made = base = super().create_optimizer(model)
        while isinstance(base, AcceleratedOptimizer):
            base = base.optimizer
        if self.sam_optimizer is None or self.sam_optimizer.base_optimizer is not base:
            self.sam_optimizer = SAM(
                base.param_groups, lambda _: base, self.sam.rho, self.sam.adaptive,
                perturb_decay=self.sam.perturb_decay, norm_eps=self.sam.norm_eps,
            )  # fmt: skip
            # what schedules start from; checkpoints have what they have become
            by_rate = self.sam.rho_schedule == "lr"
            self._initial = [
                (group["rho"], group["adaptive"], float(group["lr"]) if by_rate else 0.0)
                for group in base.param_groups
            ]
        whole: Any = self.model
        self._statistics = RunningStatistics(whole)
        self._devices = {self.args.device, *(p.device for p in whole.parameters())}
        return made

    # --- a step ----------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the batches of a step and their number of items; see ``Trainer``."""
        if self._window:
            # no step has followed these, as where a stream ends
            self._window = []
            self._sam.zero_grad()
        progress = self.state.global_step / max(1, self.state.max_steps)
        for group, (rho, adaptive, lr) in zip(self._sam.param_groups, self._initial, strict=True):
            ratio = float(group["lr"]) / lr if lr else 0.0
            group["rho"] = rho * self.sam.rho_factor(progress, ratio)
            group["adaptive"] = adaptive
        return super().get_batch_samples(*args, **kwargs)

    @property
    def _sam(self) -> SAM:
        if self.sam_optimizer is None:
            raise RuntimeError("sam_optimizer: there is none yet; call train or create_optimizer")
        return self.sam_optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Take the gradient of a batch, and where a step follows, or scope wants it, the second.

        Returns:
            The loss at the weights.
        """
        if self.recorder is not None:
            return self._recorded_step(model, inputs)
        if self.sam.scope == "per_microbatch":
            return self._batch_step(model, inputs, num_items_in_batch)
        self._window.append((inputs, RandomState(self._devices)))
        alone = self.sam.scope == "per_rank"
        with self.accelerator.no_sync(model) if alone else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            window, self._window = self._window, []
            self._second_pass(model, window, num_items_in_batch)
        return loss

    def _recorded_step(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Keep a batch, and where a step follows, record it and take its gradients."""
        assert self.recorder is not None
        model.train()
        if self.sam.bn == "frozen":
            self._statistics.freeze()
        prepared = self._prepare_inputs(inputs)
        steps = (self.state.global_step, self.state.max_steps)
        self.recorder.begin(model, self._sam, steps, self.processing_class, prepared)
        self.recorder.add(prepared)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        return self.recorder.step()

    def get_train_dataloader(self) -> Any:
        """Return batches of the training data, with the numbers of samples if it is recorded."""
        if self.recorder is None:
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        self._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        if SAMPLE not in columns:
            self._signature_columns = [*columns, SAMPLE]
        self.data_collator = NumberedCollator(collator)
        self.train_dataset = Numbered(dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _load_best_model(self) -> None:
        if self.recorder is not None:
            self.recorder.finish()
        super()._load_best_model()

    def attribute(self, dataset: Any = None, **options: Any) -> Scores:
        """Return what training samples did to samples that are asked about; see `attribute`.

        Args:
            dataset: Of which each row is a query; by default the evaluation data.
            options: Of `attribute`.

        Raises:
            RuntimeError: The run was not recorded.
        """
        if self.recorder is None:
            raise RuntimeError("attribute: the run was not recorded; give SAMTrainer(record=...)")
        batches = (self._prepare_inputs(batch) for batch in self.get_eval_dataloader(dataset))
        model = self.accelerator.unwrap_model(self.model)
        return attribute(
            self.recorder.folder, batches, model=model, objective=self.recorder.objective, **options
        )

    def _batch_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """Add the gradient where a batch's own moves the weights to the gradients of others."""
        parameters = [p for group in self._sam.param_groups for p in group["params"]]
        gathered = [p.grad for p in parameters]
        self._sam.zero_grad()
        state = RandomState(self._devices)
        with self.accelerator.no_sync(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        kept = list(zip(parameters, gathered, strict=True))
        self._second_pass(model, [(inputs, state)], num_items_in_batch, kept)
        return loss

    def _second_pass(
        self, model: nn.Module, window: Sequence[tuple[dict[str, Any], RandomState]], count: Any,
        gathered: Sequence[tuple[nn.Parameter, Tensor | None]] = (),
    ) -> None:  # fmt: skip
        """Move the weights by the gradient, take that of batches there, and put them back.

        Args:
            model: As it was prepared.
            window: Batches, and the states of chance that they were first seen in.
            count: Of items in the step.
            gathered: Gradients that are added to.
        """
        after = RandomState(self._devices)
        last = len(window) - 1
        try:
            if not self._move():
                return
            for p, gradient in gathered:
                p.grad = gradient
            with ExitStack() as stack:
                stack.enter_context(uncounted(self))
                if self.sam.bn == "first":
                    stack.enter_context(self._statistics.kept())
                for index, (inputs, state) in enumerate(window):
                    state.restore()
                    with self.accelerator.no_sync(model) if index < last else nullcontext():
                        super().training_step(model, inputs, count)
        finally:
            if self._sam.perturbed:
                self._sam.restore()
            after.restore()

    def _move(self) -> bool:
        """Move the weights by the gradient and forget it, or have a scaler skip the step."""
        sam, scaler = self._sam, self.accelerator.scaler
        if scaler is None:
            sam.first_step(zero_grad=True)
            return True
        gradients = [
            p.grad for group in sam.param_groups for p in group["params"] if p.grad is not None
        ]
        # not by the scaler, which unscales once in a step
        scale = scaler.scale(torch.ones((), device=self.args.device)).reciprocal()
        for place in {gradient.device for gradient in gradients}:
            own = [gradient for gradient in gradients if gradient.device == place]
            torch._foreach_mul_(own, scale.to(place))
        overflows = (~sam.first_step().isfinite()).to(self.args.device, torch.float32)
        if self.sam.scope != "global":
            # processes wait for each other in the second pass
            overflows = self.accelerator.reduce(overflows, "sum")
        if not overflows:
            sam.zero_grad()
            return True
        sam.restore()
        for gradient in gradients:
            # in every process, so that all scalers see it
            gradient.fill_(math.nan)
        return False

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch; see ``Trainer.compute_loss``."""
        if self.sam.bn == "frozen" and model.training:
            self._statistics.freeze()
        return super().compute_loss(model, *args, **kwargs)

    # --- what is told ----------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count both passes; see ``Trainer.floating_point_ops``."""
        return 2 * super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the first group's radius, too, where it follows a schedule; see ``Trainer.log``."""
        if "learning_rate" in logs and self.sam.rho_schedule != "constant":
            logs["rho"] = self._sam.param_groups[0]["rho"]
        super().log(logs, *args, **kwargs)


class SAMTrainer(SAMMixin, Trainer):
    """A ``transformers.Trainer`` that steps by sharpness-aware minimization; see `SAMMixin`.

    Example:
        >>> trainer = SAMTrainer(  # doctest: +SKIP
        ...     model, args, train_dataset=dataset, sam=SAMConfig(rho=0.05)
        ... )
        >>> trainer.train()
    """
