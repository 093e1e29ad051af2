"""Compression from folder to folder, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from shared_kernels.checkpoint import (
    WEIGHTS_NAME,
    TensorInfo,
    copy_side_files,
    write_index,
    write_safetensors,
)
from shared_kernels.files import write_text
from tqdm.auto import tqdm

from slimmoe import model_card
from slimmoe._version import __version__
from slimmoe.errors import ResumeError
from slimmoe.rewrite import Rewriter
from slimmoe.weights import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slimmoe.planning import CompressionPlan
    from slimmoe.rewrite import Output

MANIFEST = "slimmoe.json"
_CHUNK = 1 << 22
#: Bytes of two tensors that may be in memory at a time.
_AHEAD = 128 << 20


@torch.no_grad()
def write(
    source: str | Path | Source,
    target: str | Path,
    plan: CompressionPlan,
    *,
    max_shard_bytes: int = 5 << 30,
    resume: bool = True,
    progress: bool = True,
    base_model: str | None = None,
) -> Path:
    """Write a compressed model, shard by shard.

    What is not yet whole lies in a folder beside the target, and becomes the target at the end. A
    run that was stopped goes on behind the last whole shard.

    Args:
        source: A folder with safetensors.
        target: A folder that is not there yet, or an empty one.
        plan: Of `slimmoe.plan`, for this model.
        max_shard_bytes: Of a file; a tensor that is larger has one of its own.
        resume: Whether to go on with what was begun; else it is begun anew.
        progress: Whether to show a bar.
        base_model: Name of the source on the Hub, for the model card; by default its folder's.

    Returns:
        The target. Its ``slimmoe.json`` has the plan, and SHA-256 and size of each file of weights;
        its ``README.md`` is a model card with the licence that the source's has.

    Raises:
        FileExistsError: The target is there.
        ResumeError: What was begun has another plan, other shards, or another source.
        OSError: The disk has too little room; nothing was written.
    """
    source = source if isinstance(source, Source) else Source(source)
    target = Path(target)
    if source.path is None:
        raise ValueError(message("source", "a folder", "a model", "see compress_model"))
    if target.resolve() == source.path.resolve():
        raise ValueError(message("target", "another folder than the source", target, "name one"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder")
    shards = _shards(list(Rewriter(source, plan).outputs()), max_shard_bytes)
    begun = target.parent / f".{target.name}.slimmoe"
    manifest = _begin(begun, plan, shards, _state(source.path), resume)
    _room(target.parent, shards, manifest)
    total = sum(_bytes(out) for outputs in shards.values() for out in outputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="compress", disable=not progress) as bar:
        for name, outputs in shards.items():
            if name not in manifest["files"]:
                manifest["files"][name] = _write(begun / name, outputs, bar)
                write_text(begun / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            else:
                bar.update(sum(map(_bytes, outputs)))
    # a source that was compressed itself has another manifest
    copy_side_files(source.path, begun, skip=[MANIFEST, model_card.FILE])
    write_text(begun / model_card.FILE, model_card.card(source, plan, base_model))
    source.config_class.from_dict(plan.config).save_pretrained(begun)
    write_index(begun, {name: [_info(out) for out in outputs] for name, outputs in shards.items()})
    manifest["files"] = {name: manifest["files"][name] for name in shards}
    del manifest["source"]
    write_text(begun / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if target.exists():
        target.rmdir()
    begun.chmod(0o755)
    begun.rename(target)
    return target


def _info(out: Output) -> TensorInfo:
    return TensorInfo(out.name, out.dtype, out.shape)


def _bytes(out: Output) -> int:
    return _info(out).nbytes


def _shards(outputs: list[Output], most: int) -> dict[str, list[Output]]:
    """Return outputs by file, in their order."""
    if most < 1:
        raise ValueError(message("max_shard_bytes", "at least 1", most, "such as 5 GiB"))
    parts: list[list[Output]] = [[]]
    size = 0
    for out in outputs:
        if parts[-1] and size + _bytes(out) > most:
            parts.append([])
            size = 0
        parts[-1].append(out)
        size += _bytes(out)
    if len(parts) == 1:
        return {WEIGHTS_NAME: parts[0]}
    count = len(parts)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": p for i, p in enumerate(parts)}


def _state(folder: Path) -> dict[str, list[int]]:
    """Return size and time of change of each file of weights."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _begin(
    folder: Path,
    plan: CompressionPlan,
    shards: dict[str, list[Output]],
    source: dict[str, list[int]],
    resume: bool,
) -> dict[str, Any]:
    """Return what is whole already, of the same plan and shards."""
    manifest: dict[str, Any] = {
        "version": __version__, "plan_sha256": plan.hash, "plan": json.loads(plan.to_json()),
        "shards": {name: [out.name for out in outputs] for name, outputs in shards.items()},
        "source": source, "files": {},
    }  # fmt: skip
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / MANIFEST).is_file():
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for key, other in (
            ("plan_sha256", "another plan"), ("shards", "other shards"),
            ("source", "a source whose files were others"),
        ):  # fmt: skip
            if found.get(key) != manifest[key]:
                raise ResumeError(
                    f"{folder} was begun with {other}; remove it, or give resume=False"
                )
        # a file that was damaged since is written once more
        manifest["files"] = {
            name: told for name, told in found["files"].items()
            if (folder / name).is_file() and checksum(folder / name) == told
        }  # fmt: skip
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _room(folder: Path, shards: dict[str, list[Output]], manifest: dict[str, Any]) -> None:
    left = sum(
        _bytes(out)
        for name, outputs in shards.items()
        for out in outputs
        if name not in manifest["files"]
    )
    free = shutil.disk_usage(folder).free
    if left > free:
        raise OSError(
            f"{folder}: expected {left} bytes of room for weights, got {free}; free some, or "
            "choose another disk"
        )


def _write(path: Path, outputs: list[Output], bar: tqdm) -> dict[str, Any]:
    def made() -> Iterator[torch.Tensor]:
        # the next tensor is made while one is written; two large ones would take too much memory
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for number, out in enumerate(outputs):
                tensor = out.make() if ahead is None else ahead.result()
                following = outputs[number + 1 : number + 2]
                small = [o for o in following if _bytes(o) + _bytes(out) < _AHEAD]
                ahead = pool.submit(torch.no_grad()(small[0].make)) if small else None
                yield tensor
                bar.update(_bytes(out))

    partial = path.with_suffix(".partial")
    write_safetensors(partial, [_info(out) for out in outputs], made())
    partial.rename(path)
    return checksum(path)


def checksum(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            found.update(part)
        # what was read is not needed again
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": path.stat().st_size, "sha256": found.hexdigest()}
