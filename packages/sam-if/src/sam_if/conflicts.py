"""What a trainer cannot do together with SAM, or with a record of its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared_kernels._checks import check_choice, message

from sam_if.optim import SAM
from sam_if.recording import Numbered, Recorder, objective_for
from sam_if.requirements import check_model
from sam_if.trajectory import STORAGES

if TYPE_CHECKING:
    import os

    from sam_if.objective import Objective


def refused(trainer: Any) -> None:
    """Refuse what SAM cannot go together with, before anything is trained."""
    args = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    sharded = "leave it unset, and train with DDP (torchrun), or adapters"
    conflicts = [
        (
            trainer.is_deepspeed_enabled, "deepspeed",
            "none, which holds weights and gradients itself", True, sharded,
        ),
        (
            trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled, "fsdp",
            "none, which shards the weights that are moved", True, sharded,
        ),
        (
            trainer.is_distributed_loading_by_transformers, "model", "weights that are not sharded",
            type(trainer.model).__name__, "load it without tp_plan and DistributedConfig",
        ),
        (
            args.n_gpu > 1, "n_gpu", "1", args.n_gpu,
            "start a process for each GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one",
        ),
        (
            "lomo" in optim or "layerwise" in optim, "optim",
            "an optimizer that steps after backward, not inside", optim, "take adamw_torch, say",
        ),
        (
            isinstance(trainer.optimizer, SAM), "optimizers", "the optimizer that steps",
            type(trainer.optimizer).__name__, "the trainer wraps it: pass its base_optimizer",
        ),
        (
            hasattr(trainer, "num_generations"), "num_generations",
            "a trainer whose batches are fixed data", getattr(trainer, "num_generations", None),
            "one that generates them would do so twice in a step",
        ),
    ]  # fmt: skip
    for wrong, name, expected, got, remedy in conflicts:
        if wrong:
            raise ValueError(message(name, expected, got, remedy))


def recorder_for(
    trainer: Any, folder: str | os.PathLike[str], objective: Objective | None, storage: str
) -> Recorder:
    """Return the recorder of a trainer's run.

    Raises:
        ValueError: The trainer does what has no adjoint, or no objective is known.
    """
    args, sam = trainer.args, trainer.sam
    check_choice("storage", storage, STORAGES)
    optim = str(getattr(args.optim, "value", args.optim))
    conflicts = [
        (
            args.world_size > 1, "record", "one process", args.world_size,
            "train on one device, with gradient_accumulation_steps",
        ),
        (
            args.bf16 or args.fp16, "args", "no mixed precision", "bf16" if args.bf16 else "fp16",
            "differences of gradients are noise in 16 bits: leave bf16 and fp16 unset",
        ),
        (
            args.torch_compile, "torch_compile", "False", True,
            "compiled models have no derivatives in forward mode",
        ),
        (
            sam.scope == "per_microbatch" and args.gradient_accumulation_steps > 1, "sam",
            "scope='global' with accumulation", sam.scope, "or accumulate over one batch",
        ),
        (
            sam.perturb_decay, "sam", "perturb_decay=False", True,
            "the derivative of a run that is moved by the decay, too, is not there",
        ),
        (
            trainer.compute_loss_func is not None and objective is None, "objective",
            "that of compute_loss_func", None, "give objective=",
        ),
        (
            optim not in ("adamw_torch", "adamw_torch_fused", "sgd"), "optim",
            "adamw_torch or sgd, whose steps have an adjoint", optim, "take one of these",
        ),
    ]  # fmt: skip
    for wrong, name, expected, got, remedy in conflicts:
        if wrong:
            raise ValueError(message(name, expected, got, remedy))
    if trainer.train_dataset is not None:
        Numbered(trainer.train_dataset)
    training = trainer.model.training
    trainer.model.train()
    try:
        # batch norm is frozen by then if it is to be
        check_model(trainer.model, batch_norm=sam.bn == "frozen")
    finally:
        trainer.model.train(training)
    found = objective or objective_for(trainer.model, args.label_smoothing_factor)
    return Recorder(folder, found, args.max_grad_norm or None, storage=storage)
