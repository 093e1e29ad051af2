"""Zeroth-order steps inside ``transformers.Trainer``.

The stock trainer keeps everything that is not a gradient: data, schedules, logging, callbacks,
evaluation, checkpoints. Where it would run backward, the engine measures an estimate; where it
would step an optimizer, the estimate is committed at the scheduled learning rate.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer

from zo2._prepare import prepare, refuse_managed
from zo2.config import OffloadConfig, ZOConfig
from zo2.engine import Estimate, ZOEngine
from zo2.objective import counted, split_batch
from zo2.resume import adopt_log, set_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    # What the mixin is mixed into.
    _Base = Trainer
else:
    _Base = object

__all__ = ["ZOOptimizer", "ZOTrainer", "ZOTrainerMixin"]

logger = logging.getLogger(__name__)

LOG_NAME = "run.zolog"


def __getattr__(name: str) -> Any:
    if name != "ZOSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("trl") is None:
        raise ImportError("ZOSFTTrainer needs trl: pip install 'zo2[trl]'")
    from zo2.integrations.trl import ZOSFTTrainer

    return ZOSFTTrainer


class ZOOptimizer(torch.optim.Optimizer):
    """An engine as an optimizer: schedulers set the learning rate, ``step`` commits an estimate.

    There is one group, because a step has one learning rate. Weight decay applies to
    ``engine.decay_parameters`` only.

    Example:
        >>> optimizer = ZOOptimizer(engine, lr=1e-6)  # doctest: +SKIP
        >>> schedule = transformers.get_scheduler("linear", optimizer, 0, 1000)
        >>> for batch in loader:
        ...     optimizer.accumulate(engine.estimate(batch))
        ...     optimizer.step()
        ...     schedule.step()
    """

    def __init__(self, engine: ZOEngine, *, lr: float, weight_decay: float | None = None) -> None:
        """Make the group.

        Args:
            engine: The engine to step.
            lr: Learning rate.
            weight_decay: λ; default: the engine's.
        """
        decay = engine.zo.weight_decay if weight_decay is None else weight_decay
        params = [p for p in engine.model.parameters() if p.requires_grad]
        super().__init__(params, {"lr": lr, "weight_decay": decay})
        self.engine = engine
        self.estimate: Estimate | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group.

        Raises:
            ValueError: There is a group already.
        """
        if self.param_groups:
            raise ValueError("a zeroth-order step has one learning rate, so one parameter group")
        super().add_param_group(param_group)

    def accumulate(self, estimate: Estimate) -> None:
        """Add an estimate to the step to come; estimates of one step share its directions."""
        self.estimate = estimate if self.estimate is None else self.estimate + estimate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was accumulated."""
        self.estimate = None

    def step(self, closure: Any = None) -> Any:
        """Commit what was accumulated, at the group's learning rate and weight decay.

        Raises:
            RuntimeError: Nothing was accumulated.
            TypeError: A closure was given; it could compute no gradient.
        """
        if closure is not None:
            raise TypeError("there are no gradients a closure could recompute; pass none")
        if self.estimate is None:
            raise RuntimeError("accumulate(engine.estimate(batch)) must come before step()")
        estimate, self.estimate = self.estimate, None
        group = self.param_groups[0]
        self.engine.commit(estimate, lr=float(group["lr"]), weight_decay=group["weight_decay"])


class ZOTrainerMixin(_Base):
    """Turns a ``transformers.Trainer`` into a zeroth-order one: ``class X(ZOTrainerMixin, Y)``.

    What differs from the stock trainer:

    - ``loss`` in the logs is the mean of the losses at θ ± εz, ``grad_norm`` the mean |g|.
      ``max_grad_norm`` clips nothing (``ZOConfig.clip_g`` does), ``optim`` chooses nothing.
    - ``weight_decay`` may be given in the arguments or in ``ZOConfig``.
    - A checkpoint holds the trainer's state and the update log, a few kilobytes. It holds weights
      too if it is the last, or if ``load_best_model_at_end`` or ``save_only_model`` is set.
      Resuming needs the base model, and goes on bit for bit.
    - Gradient checkpointing is turned off: there are no activations to save.

    Attributes:
        engine: The engine; ``engine.restore()`` gives an ordinary model back.
        log_path: The update log.
    """

    engine: ZOEngine
    log_path: Path

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        zo: ZOConfig | None = None,
        offload: OffloadConfig | None = None,
        log: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """As the trainer's, with these additions.

        Args:
            model: The model, or an engine made by :func:`zo2.prepare` or
                :func:`zo2.from_pretrained` without a log.
            args: Training arguments; left unchanged.
            *rest: Passed on.
            zo: The estimator.
            offload: Where weights live; None keeps everything on the device.
            log: The update log; default ``run.zolog`` in the output folder. A log of an earlier
                run found there is kept under another name.
            **kwargs: Passed on.

        Raises:
            ValueError: The arguments ask for what a zeroth-order step cannot do; the message
                says what to use instead. See also :func:`zo2.prepare`.
        """
        engine = model if isinstance(model, ZOEngine) else None
        if engine is not None:
            if zo is not None or offload is not None:
                raise ValueError("the engine has its zo and offload already; do not give them")
            if engine.log is not None:
                raise ValueError("prepare the engine without a log: the trainer keeps it")
            model = engine.model
        elif isinstance(model, nn.Module):
            refuse_managed(model)
        # A copy: some arguments are changed below.
        super().__init__(model, copy.copy(args), *rest, **kwargs)
        args: Any = self.args
        train_mode = (engine.zo if engine else zo or ZOConfig()).train_mode
        _refuse(self, train_mode=train_mode)
        args.gradient_checkpointing = False
        if hasattr(args, "activation_checkpointing"):
            args.activation_checkpointing = False
        # The stock filter reads every loss on the host; training_step does the same on the device.
        self._filters_loss, args.logging_nan_inf_filter = args.logging_nan_inf_filter, False
        # There is no backward pass whose gradients could underflow.
        self.accelerator.scaler = None
        self.engine = engine or prepare(
            cast("nn.Module", self.model), zo, offload, device=args.device
        )
        if self.engine.device != torch.empty(0, device=args.device).device:
            raise ValueError(
                f"the engine computes on {self.engine.device}, the arguments on {args.device}"
            )
        self.log_path = Path(log if log is not None else Path(args.output_dir) / LOG_NAME)
        self._zo_optimizer: Any = None
        default = {f.name: f.default for f in dataclasses.fields(args)}["learning_rate"]
        if args.learning_rate == default:
            logger.warning(
                "learning_rate=%g is this trainer's default, meant for gradients; zeroth-order "
                "fine-tuning uses about 1e-6 for all weights, 1e-4 for adapters",
                default,
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The engine places the weights."""

    # -- steps -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; afterwards the log is complete and closed."""
        if not resume_from_checkpoint:
            self._begin_log()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.engine.close_log()

    def _begin_log(self) -> None:
        if self.engine.global_step == 0:
            kept = set_aside(self.log_path)
            if kept is not None:
                logger.warning("%s: an earlier run's log is kept as %s", self.log_path, kept.name)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.engine.open_log(self.log_path)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the :class:`ZOOptimizer`."""
        if self._zo_optimizer is None:
            own, given = self.engine.zo.weight_decay, self.args.weight_decay
            if own and given and own != given:
                raise ValueError(
                    f"ZOConfig.weight_decay={own} and TrainingArguments.weight_decay={given} "
                    "differ; give one of them"
                )
            self._zo_optimizer = ZOOptimizer(
                self.engine, lr=self.args.learning_rate, weight_decay=own or given
            )
            self.optimizer = self._zo_optimizer
        self._zo_optimizer.zero_grad()
        return cast("torch.optim.Optimizer", self.optimizer)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Measure a batch and add the estimate to the step to come.

        Losses are scaled as in the stock trainer, so accumulated estimates add up to that of the
        whole batch.

        Returns:
            (ℓ₊ + ℓ₋) / 2, without dimensions, on the device.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        parts = split_batch(inputs, self.engine.zo.micro_batch_size)
        estimate = self.engine.estimate(
            [(self._objective(model, part, inputs, num_items_in_batch), 1.0) for part in parts],
            random=self.engine.zo.train_mode or self._own_loss(),
        )
        self._zo_optimizer.accumulate(estimate)
        if not self._filters_loss:
            return estimate.loss
        usual = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(torch.isfinite(estimate.loss), estimate.loss, usual)

    def _objective(
        self, model: nn.Module, part: Mapping[str, Any], whole: Mapping[str, Any], items: Any
    ) -> Callable[[nn.Module], torch.Tensor]:
        """A part's contribution to the loss of the whole accumulated batch."""
        own, steps = self._own_loss(), self.current_gradient_accumulation_steps
        share: Any = 1.0
        if own and not self._own_loss_is_scaled(items):
            share = counted(part) / counted(whole) / steps
        elif not own:
            # Models are asked for plain means: some take num_items_in_batch and disregard it.
            shifted = self.engine.shifts_labels
            count = counted(part, shifted=shifted)
            if items is None:
                share = count / counted(whole, shifted=shifted) / steps
            else:
                share = self._get_num_items_in_batch([part], self.args.device) / items

        def objective(_: nn.Module) -> torch.Tensor:
            with self.compute_loss_context_manager():
                # A copy: compute_loss may change the mapping it is given.
                loss: Any = self.compute_loss(
                    model, dict(part), num_items_in_batch=items if own else None
                )
            if isinstance(share, torch.Tensor):
                # The mean over no labels is not a number.
                return torch.where(share > 0, loss * share, 0.0)
            return loss if share == 1 else loss * share

        return objective

    def _own_loss(self) -> bool:
        """Whether the loss is the user's: it gets ``num_items_in_batch`` and may be random."""
        stock = type(self).compute_loss is Trainer.compute_loss
        return not stock or self.compute_loss_func is not None

    def _own_loss_is_scaled(self, items: Any) -> bool:
        """Whether it divides by the size of the whole accumulated batch; the stock rule."""
        known = getattr(self, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        if self.compute_loss_func is not None:
            return True
        return self.model_accepts_loss_kwargs and items is not None

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        return self._zo_optimizer.estimate.g.abs().mean()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Two forwards per direction, instead of a forward and a backward worth two."""
        return super().floating_point_ops(inputs) * 2 * self.engine.zo.q // 3

    # -- saving ----------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the current weights; or, for a checkpoint in mid-run, the update log."""
        self.engine.sync()
        is_checkpoint = _internal_call and output_dir is not None
        if not is_checkpoint or self._checkpoint_has_weights():
            super().save_model(output_dir, _internal_call)
        if is_checkpoint and self.engine.log is not None:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.engine.log.path, folder / LOG_NAME)

    def _checkpoint_has_weights(self) -> bool:
        asked = self.args.load_best_model_at_end or self.args.save_only_model
        return asked or self.control.should_training_stop

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is None:
            state_dict = self.engine.state_dict()
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        saved = Path(resume_from_checkpoint) / LOG_NAME
        if not saved.is_file():
            raise ValueError(
                f"{resume_from_checkpoint} holds no {LOG_NAME}: it was written by a first-order "
                "trainer; load its weights as the base model instead of resuming"
            )
        if self.engine.global_step:
            raise RuntimeError(
                f"this trainer has taken {self.engine.global_step} steps already; resuming "
                "replays the log onto the base model: make a new trainer with it"
            )
        # Before a log that goes on from the checkpoint is cut back to it.
        self.engine.check_log(saved)
        kept = adopt_log(saved, self.log_path)
        if kept is not None:
            logger.warning("%s: another run's log is kept as %s", self.log_path, kept.name)
        self.engine.open_log(self.log_path)

    def _load_best_model(self) -> None:
        self.engine.close_log()
        # The log is then that of the model in hand; later updates stay in later checkpoints.
        adopt_log(Path(str(self.state.best_model_checkpoint)) / LOG_NAME, self.log_path)
        load = super()._load_best_model
        self.engine.rewrite(lambda _: load())


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``transformers.Trainer`` whose steps are zeroth-order; see :class:`ZOTrainerMixin`."""


def _refuse(trainer: Any, *, train_mode: bool) -> None:
    """Refuse arguments that the engine cannot follow, with what to do instead."""
    args = trainer.args
    refused = [
        (
            args.n_gpu > 1,
            f"{args.n_gpu} GPUs are visible and the trainer would wrap the model in DataParallel: "
            "set CUDA_VISIBLE_DEVICES to one of them",
        ),
        (args.world_size > 1, "there is more than one process: launch a single one"),
        (trainer.is_deepspeed_enabled, "DeepSpeed moves weights itself: leave deepspeed unset"),
        (trainer.is_fsdp_enabled, "FSDP moves weights itself: leave fsdp unset"),
        (trainer.model_init is not None, "model_init is not supported: pass the model"),
        (
            trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None,
            "the engine makes the update: give no optimizer",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size would start anew after some steps were taken: set "
            "ZOConfig(micro_batch_size=...)",
        ),
        (
            args.fp16_full_eval or args.bf16_full_eval,
            "full 16-bit evaluation would cast the weights away: load the model in that dtype",
        ),
        (args.torch_compile, "torch_compile replaces the model: compile its blocks' submodules"),
        (
            args.use_liger_kernel,
            "use_liger_kernel replaces forwards during training: apply Liger to the model first",
        ),
        (
            args.neftune_noise_alpha is not None and not train_mode,
            "NEFTune acts in train mode only: set ZOConfig(train_mode=True)",
        ),
    ]
    for wrong, reason in refused:
        if wrong:
            raise ValueError(f"zeroth-order training: {reason}")
