"""Load a checkpoint straight into the stores, so that the model never exists in one piece."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.checkpoint import TensorFolder
from torch import nn

from zo2._prepare import build, prepare, select_trainable

if TYPE_CHECKING:
    from shared_kernels.offload import Unit

    from zo2.config import OffloadConfig, ZOConfig
    from zo2.engine import ZOEngine

__all__ = ["from_pretrained"]

logger = logging.getLogger(__name__)


def from_pretrained(
    name_or_path: str | Path,
    zo: ZOConfig | None = None,
    offload: OffloadConfig | None = None,
    *,
    auto_class: Any = None,
    dtype: torch.dtype | str = "auto",
    log: str | Path | None = None,
    device: torch.device | str | None = None,
    trainable: str | list[str] | None = None,
    **hf_kwargs: Any,
) -> ZOEngine:
    """Load a transformers model and prepare it, one block at a time.

    Tensors go from the memory-mapped safetensors into the stores; besides the stores only one
    block is in memory. A checkpoint whose names differ from the model's (an older layout that
    transformers converts while loading) is loaded by transformers as a whole, with a warning.

    Args:
        name_or_path: A model folder, or a name of the hub.
        zo: The estimator.
        offload: Where weights live; None keeps everything on the device.
        auto_class: Default ``transformers.AutoModelForCausalLM``; any auto or model class.
        dtype: Compute dtype; "auto" takes the checkpoint's.
        log: As in :func:`zo2.prepare`.
        device: As in :func:`zo2.prepare`.
        trainable: As in :func:`zo2.prepare`.
        **hf_kwargs: Passed to ``from_config`` and ``from_pretrained`` (``attn_implementation``,
            ``revision``, ``trust_remote_code``…).

    Raises:
        ValueError: ``device_map`` or ``quantization_config`` was given.
    """
    import transformers

    for refused in ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit"):
        if hf_kwargs.get(refused) is not None:
            raise ValueError(f"{refused} cannot be combined with zo2, which places weights itself")
    auto_class = auto_class or transformers.AutoModelForCausalLM
    folder = _folder(name_or_path, hf_kwargs)
    found = None if folder is None else _meta_model(auto_class, folder, dtype, hf_kwargs)
    if found is None:
        model = auto_class.from_pretrained(name_or_path, dtype=dtype, **hf_kwargs).eval()
        return prepare(model, zo, offload, log=log, device=device, trainable=trainable)
    model, files, key_of = found
    if trainable is not None:
        select_trainable(model, trainable)

    def read(unit: Unit) -> dict[str, torch.Tensor]:
        return {p.name: files[key_of[p.name]].to(p.dtype) for p in unit.params}

    return build(model, zo, offload, read, log=log, device=device)


def _folder(name_or_path: str | Path, hf_kwargs: dict[str, Any]) -> Path | None:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    known = {k: hf_kwargs[k] for k in ("revision", "cache_dir", "token") if k in hf_kwargs}
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py", "*.jinja"]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **known))


def _meta_model(
    auto_class: Any, folder: Path, dtype: torch.dtype | str, hf_kwargs: dict[str, Any]
) -> tuple[nn.Module, TensorFolder, dict[str, str]] | None:
    """Make the model without weights, and map its parameters to the checkpoint's names."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    try:
        files = TensorFolder(folder)
    except FileNotFoundError:
        logger.warning("%s holds no safetensors: transformers loads the model as a whole", folder)
        return None
    config_kwargs = {k: v for k, v in hf_kwargs.items() if k in ("trust_remote_code", "revision")}
    config = transformers.AutoConfig.from_pretrained(folder, **config_kwargs)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    extra = {
        k: v for k, v in hf_kwargs.items() if k in ("attn_implementation", "trust_remote_code")
    }
    make = auto_class.from_config if hasattr(auto_class, "from_config") else auto_class._from_config
    # Buffers such as rotary frequencies are computed, not stored: only parameters go without.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = make(config, dtype=dtype, **extra).eval()
    model.tie_weights()
    _blank_parameters(model)
    key_of, missing = {}, []
    prefix = f"{model.base_model_prefix}."
    for name, _ in model.named_parameters():
        options = (name, name.removeprefix(prefix), prefix + name)
        key = next((k for k in options if k in files), None)
        if key is None:
            missing.append(name)
        else:
            key_of[name] = key
    if missing:
        logger.warning(
            "the checkpoint in %s has no tensor named %s (%d such): transformers loads and "
            "converts the model as a whole",
            folder, missing[0], len(missing),
        )  # fmt: skip
        return None
    generation = folder / "generation_config.json"
    if generation.is_file() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_dict(
            json.loads(generation.read_text(encoding="utf-8"))
        )
    return model, files, key_of


def _blank_parameters(model: nn.Module) -> None:
    """Replace meta parameters by NaN of their shape without memory, keeping ties."""
    blank: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in blank:
                nan = torch.full((), float("nan"), dtype=param.dtype).expand(param.shape)
                blank[id(param)] = nn.Parameter(nan, requires_grad=param.requires_grad)
            module._parameters[name] = blank[id(param)]
