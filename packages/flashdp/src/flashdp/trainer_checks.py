"""What a private trainer refuses: arguments it cannot follow, losses that couple the units."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from flashdp.errors import PrivacyError
from flashdp.losses import loss_owner, unit_loss
from flashdp.units import packed_starts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from flashdp.config import PrivacyArguments

__all__ = ["check_loss", "loss_kind", "read_state", "refuse_arguments", "refuse_trainer"]


def loss_kind(trainer: Any) -> str:
    """How the loss adds up: ``"sum"`` and ``"mean"`` over rows, or ``"rows"`` of one each."""
    owner = loss_owner(trainer.model)
    if trainer.compute_loss_func is not None or not hasattr(owner, "loss_function"):
        return "rows"
    known = {None: "sum", "ForCausalLM": "sum", "ForSequenceClassification": "mean"}
    if owner.loss_type not in known:
        raise ValueError(
            f"private training: the loss of a {type(owner).__name__} ({owner.loss_type}) is a mean "
            "over the batch, which couples its units: give a compute_loss_func that returns one "
            "loss per row"
        )
    return known[owner.loss_type]


def check_loss(loss: Tensor, outputs: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse a model that computes its loss by itself, or adds a term over the batch."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    labels = inputs.get("labels")
    if logits is None or labels is None:
        return
    expected = unit_loss(logits.detach(), labels, cu_seq_lens_q=packed_starts(inputs))
    # Both are float32 sums of the same logits' losses; a router's loss can be a thousandth of that.
    if not torch.allclose(loss.detach().float(), expected, rtol=1e-5, atol=1e-6):
        raise PrivacyError(
            f"the model's loss is {loss.item():.6g}, the sum of its rows' losses "
            f"{float(expected):.6g}: it holds terms over the whole batch; turn them off (a "
            "router's loss, say) or give a compute_loss_func that returns one loss per row"
        )


def refuse_arguments(args: Any, privacy: PrivacyArguments) -> None:
    """Refuse arguments that a private step cannot follow, with what to do instead."""
    physical, given = args.per_device_train_batch_size, privacy.max_physical_batch_size
    accelerator = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    optim = str(getattr(args.optim, "value", args.optim))
    refused = [
        (privacy.target_delta is None, "PrivacyArguments.target_delta is needed for the report"),
        (
            given not in (None, physical),
            f"PrivacyArguments.max_physical_batch_size={given} and per_device_train_batch_size="
            f"{physical} say the same thing: leave the former out",
        ),
        (
            args.gradient_accumulation_steps != 1 or "num_steps" in accelerator,
            "gradient_accumulation_steps follows from expected_batch_size and "
            "per_device_train_batch_size: leave it at 1",
        ),
        (
            getattr(args, "train_sampling_strategy", "random") != "random"
            or getattr(args, "group_by_length", False),
            "every unit has to be drawn with the same probability: leave train_sampling_strategy "
            "at 'random'",
        ),
        (args.fp16, "fp16 skips steps whose gradients overflow, which says something: use bf16"),
        (
            args.dataloader_drop_last,
            "dataloader_drop_last makes what is used depend on the number of rows: leave it out",
        ),
        (
            bool(args.label_smoothing_factor),
            "label_smoothing_factor averages over the tokens of the batch, which couples its "
            "units: smooth in a compute_loss_func that returns one loss per row",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size would repeat steps: set per_device_train_batch_size",
        ),
        (args.torch_compile, "torch_compile replaces the model: compile parts of it instead"),
        (args.use_liger_kernel, "use_liger_kernel replaces layers and the loss: leave it out"),
        (
            "lomo" in optim or "layerwise" in optim,
            f"optim={optim} updates inside backward, before there is noise: take another",
        ),
        (
            privacy.accountant == "rdp",
            "the accountant 'rdp' has no bound for draws that are cut to a fixed number of "
            "physical batches: use 'pld'",
        ),
    ]
    _raise_first(refused)


def refuse_trainer(trainer: Any) -> None:
    """Refuse what is only known once the trainer is made."""
    args = trainer.args
    refused = [
        (args.n_gpu > 1, "several GPUs are visible: set CUDA_VISIBLE_DEVICES to one of them"),
        (trainer.is_deepspeed_enabled, "DeepSpeed makes gradients itself: leave deepspeed unset"),
        (
            trainer.is_fsdp_enabled,
            "FSDP shards layers after they are made private: leave fsdp unset, or shard by "
            "fully_shard and use PrivacyEngine in a loop of your own",
        ),
        (trainer.model_init is not None, "model_init would train anew unaccounted: pass the model"),
    ]
    _raise_first(refused)


def _raise_first(refused: list[tuple[bool, str]]) -> None:
    for wrong, reason in refused:
        if wrong:
            raise ValueError(f"private training: {reason}")


def read_state(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint's privacy state, and refuse that of another run.

    Args:
        path: The file.
        now: What both runs have to share.
    """
    if not path.is_file():
        raise PrivacyError(
            f"{path} does not exist: the checkpoint was written without privacy, and its steps "
            "cannot be accounted for; take one of a private run, or start anew"
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, then = state["version"], state["run"]
        changes = [f"{key} {then[key]} -> {now[key]}" for key in now if then[key] != now[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise PrivacyError(f"{path} is damaged: {error!r}; take another checkpoint") from error
    if version != 1:
        raise PrivacyError(f"{path}: expected version 1, got {version!r}")
    if changes:
        raise PrivacyError(
            f"the checkpoint is of another run: {', '.join(changes)}; resume with what it was"
        )
    return state
