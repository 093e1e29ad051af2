"""Differentially private training inside ``transformers.Trainer``.

The stock trainer keeps optimizers, schedules, callbacks, evaluation and checkpoints. Batches are
Poisson draws in a fixed number of physical batches, gradients are clipped inside backward, and
every optimizer step is accounted for before it is taken.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import logging
import math
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.files import write_text
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from flashdp.accounting import Accountant, calibrate
from flashdp.engine import PrivacyEngine
from flashdp.errors import PrivacyError
from flashdp.groups import AdaptiveThresholds
from flashdp.loader import PoissonDataLoader, poisson_data_loader
from flashdp.trainer_checks import (
    check_loss,
    loss_kind,
    read_state,
    refuse_arguments,
    refuse_trainer,
)
from flashdp.trainer_epochs import Epochs, steps_for

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from torch import Tensor, nn

    from flashdp.config import PrivacyArguments
    from flashdp.report import PrivacyReport

    # What the mixin is mixed into.
    _Base = Trainer
else:
    _Base = object

__all__ = ["DPTrainer", "DPTrainerMixin"]

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    if name != "DPSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("trl") is None:
        raise ImportError("DPSFTTrainer needs trl: pip install 'flashdp[trl]'")
    from flashdp.integrations.trl import DPSFTTrainer

    return DPSFTTrainer


STATE_NAME = "flashdp_state.json"
# Read by the engine on the host.
_HOST_KEYS = ("dp_rows", "dp_last", "dp_batch")


class DPTrainerMixin(_Base):
    """Makes a ``transformers.Trainer`` private: ``class X(DPTrainerMixin, Y)``.

    What differs from the stock trainer:

    - ``per_device_train_batch_size`` is the physical batch; a step is a draw of
      ``privacy.expected_batch_size`` units on average, and an epoch 1/q steps.
      ``gradient_accumulation_steps`` follows.
    - The number of units is treated as public; draws that do not fit the physical batches of a step
      (six standard deviations above the mean, or ``privacy.max_batch_size``) are cut to a random
      subset and accounted so.
    - ``args.max_grad_norm`` does nothing; ``privacy.max_grad_norm`` bounds a unit's contribution.
    - The training loss is not logged: it is no private number. No gradient norm is logged either.
    - Under several processes (``torchrun``, ``accelerate launch``) each draws from its own share of
      the units, the engine adds up their sums, and all add the same noise, once.
    - A trainer takes one run. Steps that it must count beforehand (earlier runs on the same data)
      can be told to ``engine.accountant``; training then stops before the target is exceeded.

    Attributes:
        engine: The engine, attached while training.
        loader: The Poisson loader.
        privacy: The privacy arguments.
    """

    engine: PrivacyEngine
    loader: PoissonDataLoader | None

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        privacy: PrivacyArguments | None = None,
        unit_ids: Sequence[Hashable] | None = None,
        log_non_private_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the trainer's, with these additions.

        Args:
            model: The model, or a PEFT model; what requires gradients is trained privately.
            args: Training arguments; left unchanged.
            *rest: Passed on.
            privacy: The guarantee. ``target_delta`` is needed.
            unit_ids: Whose row it is, for every row of the training data; default: the column
                ``privacy.unit_ids_key``, if that is given.
            log_non_private_loss: Log an estimate of the mean loss: outside the guarantee.
            **kwargs: Passed on. ``compute_loss_func`` must return one loss per row.

        Raises:
            ValueError: The arguments ask for what a private step cannot do; the message says what
                to use instead.
        """
        if privacy is None:
            raise ValueError("private training: privacy=PrivacyArguments(...) is missing")
        if args is not None:
            refuse_arguments(args, privacy)
        # A copy: some arguments are changed below.
        super().__init__(model, copy.copy(args), *rest, **kwargs)
        refuse_trainer(self)
        self.privacy, self.log_non_private_loss = privacy, log_non_private_loss
        self.engine = PrivacyEngine(
            accountant=privacy.accountant, secure_rng=privacy.secure_rng, seed=privacy.seed
        )
        self._loss_kind = loss_kind(self)
        self._loss_checked = self._loss_kind != "sum"
        self._unit_ids = privacy.unit_ids_key if unit_ids is None else unit_ids
        self._started = False
        self._restored: dict[str, Any] | None = None
        self._limit: float = math.inf
        # It is True by default, and would only matter to token counts over the whole batch.
        self.args.average_tokens_across_devices = False
        # Skipping is the loader's: a draw that was used is never made again.
        self.args.ignore_data_skip = True
        self.loader = None
        if self.train_dataset is not None:
            self.loader = self._make_loader()
            self._epochs = Epochs(self.loader)
            self.args.gradient_accumulation_steps = self._epochs.batches_per_step
            self.args.max_steps = self.loader.num_steps

    # -- batches ---------------------------------------------------------------------------------

    def _make_loader(self) -> PoissonDataLoader:
        args, privacy = self.args, self.privacy
        dataset: Any = self.train_dataset
        options: dict[str, Any] = {
            "expected_batch_size": privacy.expected_batch_size,
            "sample_rate": privacy.sample_rate,
            "public_n": "dataset",
            "unit_ids": self._unit_ids,
            "max_rows_per_unit": privacy.max_rows_per_unit,
            "secure_rng": privacy.secure_rng,
            "seed": privacy.seed,
        }
        # Units, rate and number of steps depend on each other: a first loader counts the units.
        counted = poisson_data_loader(dataset, num_steps=1, **options)
        n, q, size = counted.n_units, counted.sample_rate, args.per_device_train_batch_size
        # Each process draws from its own share of the units.
        ranks = args.world_size
        n, cap = -(-n // ranks), privacy.max_batch_size and privacy.max_batch_size // ranks
        largest = cap or math.ceil(n * q + 6 * math.sqrt(n * q * (1 - q)))
        per_batch = max(1, size // (privacy.max_rows_per_unit or 1))
        steps = args.max_steps if args.max_steps > 0 else steps_for(args.num_train_epochs, q)
        collator: Any = self.data_collator
        if hasattr(dataset, "remove_columns"):
            if isinstance(self._unit_ids, str):
                options["unit_ids"] = dataset[self._unit_ids]
            dataset = self._remove_unused_columns(dataset, description="Training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="Training")
        if args.dataloader_num_workers:
            options["prefetch_factor"] = args.dataloader_prefetch_factor
        return poisson_data_loader(
            dataset,
            num_steps=steps,
            max_batch_size=cap,
            max_physical_batch_size=size,
            physical_batches_per_step=math.ceil(min(largest, n) / per_batch),
            annotate=True,
            shard=args.process_index,
            num_shards=ranks,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            **options,
        )

    def get_train_dataloader(self) -> Any:
        """Return the batches of the Poisson loader, an epoch of 1/q steps at a time."""
        if self.loader is None:
            raise ValueError("private training: the trainer was made without a train_dataset")
        return self._epochs

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the batches of a step, and no count over them: it would couple the units."""
        return list(islice(epoch_iterator, num_batches)), None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {key: inputs[key] for key in _HOST_KEYS if key in inputs}
        rest = {key: value for key, value in inputs.items() if key not in kept}
        return {**super()._prepare_inputs(rest), **kept}

    # -- a step ----------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Gather the clipped gradients of a physical batch.

        Returns:
            Zero; or, if it is to be logged, the batch's part of the step's mean loss.
        """
        if self.engine.accountant.steps >= self._limit:
            raise PrivacyError(f"a step beyond {self._limit} would exceed the target epsilon")
        # The stock step would divide the sum over units by it.
        self.current_gradient_accumulation_steps = 1
        mask = inputs["dp_mask"]
        self._check_independence(model, inputs)
        loss = super().training_step(model, inputs, None)
        if not self.log_non_private_loss:
            return torch.zeros_like(loss)
        # Padding rows repeat a real one: their share is taken off.
        loss = loss * float(mask.float().mean()) / self.privacy.expected_batch_size
        # The trainer takes the mean over processes.
        loss = loss * self.args.world_size
        return loss * self.args.per_device_train_batch_size if self._loss_kind == "mean" else loss

    def _check_independence(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Probe the first batch, with the loss that training uses."""
        model.train()
        if not self.engine.independence.due(len(inputs["dp_mask"])):
            return

        def loss_of(batch: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(batch))

        self.engine.independence.check(self._prepare_inputs(inputs), loss_of)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum of the units' losses while training; otherwise as the trainer's."""
        if not (model.training and torch.is_grad_enabled()):
            attached = self.engine._model is not None
            with self.engine.loss.paused() if attached else contextlib.nullcontext():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, None)
        if not self._loss_checked:
            check_loss(loss, outputs, inputs)
            self._loss_checked = True
        if self._loss_kind == "rows":
            if loss.ndim != 1:
                raise PrivacyError(
                    f"the loss has the shape {tuple(loss.shape)}: return one loss per row, because "
                    "a mean over the batch couples its units"
                )
            loss = loss.sum()
        elif self._loss_kind == "mean" and labels is not None and bool((labels == -100).any()):
            raise PrivacyError(
                "rows without a label change the mean over the batch: leave them out of the data"
            )
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: there are no gradients before the optimizer's step makes private ones."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Nothing, so that none is logged."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log all but the placeholders of the training loss."""
        if self.loader is not None and self.is_in_train:
            # A resumed epoch is shorter than the trainer thinks.
            self.state.epoch = self.state.global_step / self._epochs.steps
        hidden = set() if self.log_non_private_loss else {"loss", "train_loss"} & logs.keys()
        if hidden:
            # Otherwise the same object: trainers add to what `evaluate` returns.
            logs = {key: value for key, value in logs.items() if key not in hidden}
        super().log(logs, *args, **kwargs)

    # -- a run -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; the report is written to the output folder at the end.

        Raises:
            PrivacyError: The checkpoint is of another run, or the budget is spent.
            RuntimeError: This trainer has trained already.
        """
        if self._started:
            raise RuntimeError("this trainer has trained already: make a new one for a new run")
        self.get_train_dataloader()
        self._calibrate()
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(str(self.args.output_dir))
            path = Path(str(resume_from_checkpoint)) / STATE_NAME
            self._restored = read_state(path, self._run())
        self._started = True
        if self.args.world_size > 1:
            self._join_processes()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.engine.detach()
            if self.engine.accountant.steps and self.is_world_process_zero():
                self.privacy_report().save(str(self.args.output_dir))
        if self.log_non_private_loss:
            return output
        metrics = {key: value for key, value in output.metrics.items() if key != "train_loss"}
        return output._replace(training_loss=math.nan, metrics=metrics)

    def _join_processes(self) -> None:
        """Start from the same weights, without DDP.

        The engine adds sums up over processes; DDP would find no gradients, and hold buckets as
        large as they would be.
        """
        model: Any = self.model
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
        accelerator: Any = self.accelerator
        accelerator.prepare_model = functools.partial(
            accelerator.prepare_model, evaluation_mode=True
        )

    def _calibrate(self) -> None:
        privacy, loader = self.privacy, self._loader()
        if privacy.noise_multiplier is not None:
            self.noise_multiplier = privacy.noise_multiplier
            return
        drawn = loader.mechanism(1.0)
        assert privacy.target_epsilon is not None
        assert privacy.target_delta is not None
        self.noise_multiplier = calibrate(
            privacy.target_epsilon,
            privacy.target_delta,
            sample_rate=drawn.sample_rate,
            steps=loader.num_steps,
            kind=privacy.accountant,
            sampling=drawn.sampling,
            dataset_size=drawn.dataset_size,
            truncated_batch_size=drawn.truncated_batch_size,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer and attach the engine to it."""
        optimizer = super().create_optimizer(model)
        if self.engine._model is not None:
            return optimizer
        privacy, loader = self.privacy, self._loader()
        private: Any = self.model
        thresholds = None
        if privacy.thresholds == "adaptive":
            thresholds = AdaptiveThresholds(
                quantile=privacy.quantile, eta=privacy.eta, share=privacy.share
            )
        self.engine.make_private(
            private,
            optimizer,
            loader,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=privacy.expected_batch_size,
            grouping=privacy.grouping,
            clipping=privacy.clipping,
            stability=privacy.stability,
            thresholds=thresholds,
            noise_allocation=privacy.noise_allocation,
            loss_reduction="mean" if self._loss_kind == "mean" else "sum",
            check_independence=privacy.check_independence,
        )
        # With the trainer's loss, below.
        self.engine.independence.by_itself = False
        if self._restored is not None:
            self.engine.load_state_dict(self._restored["engine"])
            loader.load_state_dict(self._restored["loader"])
        self._set_limit()
        return optimizer

    def _set_limit(self) -> None:
        """Let the run end before its budget does."""
        privacy, loader, accountant = self.privacy, self._loader(), self.engine.accountant
        if privacy.target_epsilon is None or privacy.target_delta is None:
            return
        mechanism, done = self.engine.mechanism, accountant.steps
        remaining = loader.num_steps - loader.steps_done
        budget = (privacy.target_epsilon, privacy.target_delta)
        if all(used == mechanism for used, _ in accountant.history):
            # Composed at once, as for the calibration: in parts, rounding costs a little more.
            fresh = Accountant(privacy.accountant, mechanism)
            allowed = fresh.steps_within(*budget, limit=done + remaining) - done
        else:
            allowed = accountant.steps_within(*budget, limit=remaining, mechanism=mechanism)
        if remaining and allowed < 1:
            raise PrivacyError(
                f"{done} steps have spent epsilon {accountant.epsilon(budget[1]):.4g}, and one "
                f"more would exceed {budget[0]:g}: raise target_epsilon"
            )
        self._limit = done + allowed
        if allowed < remaining:
            logger.warning("%d of %d steps fit into the budget", allowed, remaining)
            self.state.max_steps = self.state.global_step + allowed

    def _loader(self) -> PoissonDataLoader:
        assert self.loader is not None
        return self.loader

    def privacy_report(self, delta: float | None = None) -> PrivacyReport:
        """Return what the steps taken so far guarantee.

        Args:
            delta: δ; default: ``privacy.target_delta``.
        """
        if not self._started:
            raise RuntimeError("there is nothing to report before train()")
        notes = ["the training loss was logged without noise"] if self.log_non_private_loss else []
        chosen: Any = self.privacy.target_delta if delta is None else delta
        return self.engine.report(chosen, public_n=self._loader().n_units, notes=notes)

    # -- checkpoints -----------------------------------------------------------------------------

    def _run(self) -> dict[str, Any]:
        """What a resumed run has to share with the one it continues."""
        return {
            "units": self._loader().n_units,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self._loader().sample_rate,
            "expected_batch_size": self.privacy.expected_batch_size,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's; a checkpoint also gets the privacy state, without the noise key."""
        super().save_model(output_dir, _internal_call)
        if not (_internal_call and output_dir and self.engine._model and self.args.should_save):
            return
        state = {
            "version": 1,
            "run": self._run(),
            "engine": self.engine.state_dict(),
            "loader": self._loader().state_dict(),
        }
        write_text(Path(output_dir) / STATE_NAME, json.dumps(state, indent=2) + "\n")


class DPTrainer(DPTrainerMixin, Trainer):
    """``transformers.Trainer`` with differential privacy; see :class:`DPTrainerMixin`.

    Example:
        >>> privacy = PrivacyArguments(  # doctest: +SKIP
        ...     target_epsilon=8, target_delta=1e-6, expected_batch_size=256
        ... )
        >>> trainer = DPTrainer(model, args, train_dataset=data, privacy=privacy)
        >>> trainer.train()
    """
