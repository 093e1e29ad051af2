"""Modules of multi-token prediction beside the weights of a saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels.checkpoint import TensorFolder, TensorInfo, write_safetensors
from shared_kernels.files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from slimmoe.mtp.modeling_mtp import MTPHead

FILE = "model-mtp.safetensors"
_INDEX = "model.safetensors.index.json"


def write_modules(
    folder: str | Path, head: MTPHead, state: Mapping[str, Tensor] | None = None
) -> None:
    """Add modules to a folder, in a file of their own and in the index of all.

    Plain transformers takes ``model.safetensors`` where there is one, and leaves these names aside
    where there is not; what reads the index, such as vLLM, finds them.

    Args:
        folder: Of ``save_pretrained``.
        head: The modules.
        state: Their weights, as `MTPHead.tensors` takes them.
    """
    folder = Path(folder)
    index: dict[str, Any]
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    else:
        found = TensorFolder(folder)
        index = {
            "metadata": {"total_size": sum(t.nbytes for ts in found.shards.values() for t in ts)},
            "weight_map": dict(found.file_of),
        }
    tensors = {name: tensor.contiguous() for name, tensor in head.tensors(state)}
    infos = [TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    write_safetensors(folder / FILE, infos, tensors.values())
    index["metadata"]["total_size"] += sum(info.nbytes for info in infos)
    index["weight_map"] |= dict.fromkeys(tensors, FILE)
    write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")
