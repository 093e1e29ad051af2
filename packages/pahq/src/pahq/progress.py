"""Searches that were stopped, and go on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from shared_kernels.files import write_bytes

from pahq.errors import ResumeError

if TYPE_CHECKING:
    from pathlib import Path

    from pahq.acdc import Acdc

#: In a folder.
FILE = "search.safetensors"
_COUNTS = ("tested", "skipped", "kept", "batches", "rows", "checked")


def save(folder: Path, search: Acdc, layer: int, key: dict[str, Any]) -> None:
    """Write what is decided, down to a layer, in place of what was there.

    Args:
        folder: Made if it is missing.
        search: So far.
        layer: The last one that is decided.
        key: What the search depends on.
    """
    graph, found = search.graph, search.found
    effects = torch.full((graph.senders, graph.receivers), float("nan"), dtype=torch.float64)
    for edge, effect in found.effects.items():
        effects[edge] = effect
    direct = torch.full((graph.receivers,), float("nan"), dtype=torch.float64)
    for receiver, effect in found.direct.items():
        direct[receiver] = effect
    counts = {name: value for name, value in asdict(found).items() if name in _COUNTS}
    document = {"key": key, "layer": layer, "value": found.value, "counts": counts}
    tensors = {"present": search.current.present, "effects": effects, "direct": direct}
    write_bytes(folder / FILE, serialized(tensors, metadata={"pahq": json.dumps(document)}))


@torch.no_grad()
def load(folder: Path, search: Acdc, key: dict[str, Any]) -> int | None:
    """Continue a search from what was written, and return the last decided layer; None for none.

    Raises:
        ResumeError: It was begun with another model, task or setting, the file is damaged, or the
            folder is none.
    """
    if folder.exists() and not folder.is_dir():
        raise ResumeError(f"resume_from: expected a folder, got the file {folder}")
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()["pahq"])
            tensors = {name: file.get_tensor(name) for name in ("present", "effects", "direct")}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"resume_from: {path} is damaged or something else ({error}); delete it to begin anew"
        ) from error
    was = document["key"]
    differ = sorted(name for name in {*was, *key} if was.get(name) != key.get(name))
    if differ:
        listed = ", ".join(
            f"{name} ({was.get(name)} there, {key.get(name)} now)" for name in differ
        )
        raise ResumeError(
            f"resume_from: the search in {folder} was begun with another {listed}; choose another "
            "folder, or go on with what it was begun with"
        )
    found = search.found
    for edge in (~tensors["effects"].isnan()).nonzero().tolist():
        found.effects[edge[0], edge[1]] = float(tensors["effects"][tuple(edge)])
    for receiver in (~tensors["direct"].isnan()).nonzero()[:, 0].tolist():
        found.direct[receiver] = float(tensors["direct"][receiver])
    for name, value in document["counts"].items():
        setattr(found, name, value)
    search.continue_from(tensors["present"], int(document["layer"]))
    found.value = document["value"]
    return int(document["layer"])


def weights_of(model: Any) -> str:
    """Return a hash of all parameters of a model, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().contiguous().flatten().view(torch.uint8).cpu()
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()[:16]
