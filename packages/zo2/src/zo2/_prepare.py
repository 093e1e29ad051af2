"""Take a model over: decide where every block lives, move the weights there, build the engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.offload import (
    BlockPlan,
    OffloadEngine,
    Unit,
    WeightStore,
)
from shared_kernels.random import param_uid
from torch import nn

from zo2.config import OffloadConfig, ZOConfig, parse_bytes
from zo2.engine import ZOEngine
from zo2.fingerprint import ParameterEntry, make_header
from zo2.materializer import ExactMaterializer, Materializer
from zo2.mezo import MezoMaterializer, MezoPending
from zo2.pending import PendingRecords
from zo2.placement import Placement, place
from zo2.reference import mezo_decays

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["build", "prepare", "refuse_managed", "select_trainable"]

ReadUnit = Callable[[Unit], dict[str, torch.Tensor]]


def prepare(
    model: nn.Module,
    zo: ZOConfig | None = None,
    offload: OffloadConfig | None = None,
    *,
    log: str | Path | None = None,
    device: torch.device | str | None = None,
    trainable: str | Iterable[str] | None = None,
) -> ZOEngine:
    """Make an engine that fine-tunes ``model`` with forward passes alone.

    The model's parameters move into the engine's stores, block by block; the model object stays
    usable and computes with them.

    Args:
        model: Any module with repeated blocks, typically from transformers, adapters included.
            Parameters with ``requires_grad`` are trained.
        zo: The estimator; default MeZO's.
        offload: Where weights live; None keeps everything on the device.
        log: A ``.zolog`` file. A new one is started; an existing one is continued: its updates
            are replayed first, so ``model`` must be the base the log was started from.
        device: Default: CUDA if there, else the CPU.
        trainable: Regular expression(s) for names of the parameters to train; the others are
            frozen. Default: ``requires_grad`` as it is.

    Raises:
        ValueError: Nothing is trainable, the model is already managed by accelerate, FSDP,
            DeepSpeed or a quantiser, no blocks are found, or a budget cannot be met.
        HostMemoryError: The stores do not fit into host memory; nothing was allocated.
        LogError: The log belongs to another model or run.
    """
    refuse_managed(model)
    if trainable is not None:
        select_trainable(model, trainable)

    def read(unit: Unit) -> dict[str, torch.Tensor]:
        return {p.name: p.parameter.detach() for p in unit.params}

    return build(model, zo, offload, read, log=log, device=device)


def build(
    model: nn.Module,
    zo: ZOConfig | None,
    offload: OffloadConfig | None,
    read: ReadUnit,
    *,
    log: str | Path | None,
    device: torch.device | str | None,
) -> ZOEngine:
    """Build an engine whose weights come from ``read``, unit by unit; see :func:`prepare`."""
    zo = zo or ZOConfig()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no parameter has requires_grad=True, so nothing would be trained; unfreeze some, "
            "or give trainable='.*'"
        )
    decay = decay_parameters(model, zo.arithmetic)
    place_ = place(model, zo, offload, device)
    store = WeightStore(
        place_.layouts,
        device,
        place_.on_device,
        pin=offload.pin if offload else "none",
        host_limit=parse_bytes(offload.host) if offload and offload.host is not None else None,
        freed_meanwhile=_host_bytes(model, place_),
    )
    _fill(store, place_.plan, read)
    pending, materializer = _arithmetic(model, zo, place_, store, decay)
    engine = OffloadEngine(
        model, place_.plan, store, materializer, prefetch=offload.prefetch if offload else 1
    )

    def header(hashes: dict[str, str]) -> dict[str, Any]:
        table = _table(model, place_, hashes, decay)
        return make_header(table, zo, fold_every=place_.fold_every, device=device)

    made = ZOEngine(
        model,
        zo,
        offload,
        engine=engine,
        materializer=materializer,
        pending=pending,
        header=header,
        decay=decay,
    )
    if log is not None:
        made.open_log(log)
    return made


def _arithmetic(
    model: nn.Module, zo: ZOConfig, place_: Placement, store: WeightStore, decay: set[str]
) -> tuple[PendingRecords, Materializer]:
    if zo.arithmetic == "mezo":
        mezo_pending = MezoPending(zo.seed, zo.q, place_.fold_every, store.device)
        order = [name for name, p in model.named_parameters() if p.requires_grad]
        return mezo_pending, MezoMaterializer(
            store, mezo_pending, place_.plan, order, eps=zo.eps, decay=decay
        )
    pending = PendingRecords(zo.seed, zo.q, place_.fold_every, store.device)
    return pending, ExactMaterializer(
        store, pending, eps=zo.eps, fold_every=place_.fold_every, dist=zo.dist, decay=decay
    )


# -- what is refused -----------------------------------------------------------------------------


def refuse_managed(model: nn.Module) -> None:
    """Refuse a model whose weights somebody else moves."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"module {name!r} carries an accelerate hook (device_map or cpu_offload): load "
                "the model without device_map, zo2 places it; or remove the hooks with "
                "accelerate.hooks.remove_hook_from_submodules(model)"
            )
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine", "DistributedDataParallel"):
            raise ValueError(
                f"module {name!r} is wrapped in {kind}, which moves weights itself: pass the "
                "model it wraps"
            )
        if kind == "DataParallel":
            raise ValueError(
                "torch.nn.DataParallel copies the model to every GPU: set CUDA_VISIBLE_DEVICES "
                "to one GPU, or pass model.module"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model was loaded with a quantization_config; load it in float32, bfloat16 or "
            "float16"
        )
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise ValueError(
            f"parameter {meta[0]!r} is on the meta device and has no value: use "
            "zo2.from_pretrained, which loads shard by shard"
        )


def select_trainable(model: nn.Module, patterns: str | Iterable[str]) -> None:
    """Set ``requires_grad`` by regular expressions over parameter names."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, _ in model.named_parameters()]
    for pattern in listed:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"trainable pattern {pattern!r} matches no parameter; names are like {names[:3]}"
            )
    for name, param in model.named_parameters():
        param.requires_grad_(any(re.fullmatch(pattern, name) for pattern in listed))


def decay_parameters(model: nn.Module, arithmetic: str) -> set[str]:
    """Names that weight decay applies to: ``transformers.Trainer``'s rule, or MeZO's."""
    from transformers.trainer_pt_utils import get_parameter_names

    if arithmetic == "mezo":
        return {name for name, _ in model.named_parameters() if mezo_decays(name)}
    # The patterns are those of Trainer.get_decay_parameter_names, which needs a Trainer to call.
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return set(get_parameter_names(model, [nn.LayerNorm], patterns))


# -- moving in -----------------------------------------------------------------------------------


def _host_bytes(model: nn.Module, place_: Placement) -> int:
    """Host bytes of the model's own blocks that are given back while the store is filled."""
    freed, peak, used = 0, 0, 0
    for unit, layout in zip(place_.plan.units, place_.layouts, strict=True):
        if unit.index in place_.on_device:
            continue
        used += layout.nbytes
        peak = max(peak, used - freed)
        # Expanded placeholders and GPU tensors hold no host memory.
        freed += sum(
            min(p.nbytes, p.parameter.untyped_storage().nbytes())
            for p in unit.params
            if p.parameter.device.type == "cpu"
        )
    return used - peak


def _fill(store: WeightStore, plan: BlockPlan, read: ReadUnit) -> None:
    for unit in plan.units:
        values = read(unit)
        home = store.home(unit.index)
        home.layout.write(home.flat, values)
        del values
        for p in unit.params:
            p.parameter.data = torch.empty((), dtype=p.dtype).expand(p.shape)


def _table(
    model: nn.Module, place_: Placement, hashes: dict[str, str], decay: set[str]
) -> list[ParameterEntry]:
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    rows = {
        p.name: ParameterEntry(
            name=p.name,
            shape=tuple(p.shape),
            dtype=str(p.dtype).removeprefix("torch."),
            uid=param_uid(p.name),
            decay=p.name in decay,
            unit=layout.unit.index,
            store=run.codec.name,
            hash=hashes[p.name],
            aliases=tuple(n for n in names[id(p.parameter)] if n != p.name),
        )
        for layout in place_.layouts
        for run in layout.runs
        for p in run.params
    }
    # In model order, which is the order in which MeZO's arithmetic draws.
    return [rows[name] for name, p in model.named_parameters() if p.requires_grad]
