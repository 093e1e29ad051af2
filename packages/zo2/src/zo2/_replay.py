"""Turn base weights and an update log into the fine-tuned model, bit for bit.

Every parameter is replayed on its own, in pieces, so memory beyond the result stays small and the
work is bound by noise generation alone. A log that does not belong to the base is refused.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels.checkpoint import (
    WEIGHTS_NAME,
    TensorFolder,
    TensorInfo,
    copy_side_files,
    replacing_folder,
    write_index,
    write_safetensors,
)
from tqdm.auto import tqdm

from zo2.fingerprint import LogHeader, ParameterEntry, hash_tensor, rng_fingerprint
from zo2.log import FLUSH, SKIPPED, LogError, UpdateLog
from zo2.updates import folds, update_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TILE = 4096
_CHUNK = 2**26
_LEAST_CHUNK = 2**18
_DRAWS_PER_CALL = 2**33


def replay(
    base: str | os.PathLike[str] | Mapping[str, Tensor] | PreTrainedModel,
    log: UpdateLog | str | os.PathLike[str],
    *,
    upto: int | None = None,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Any:
    """Apply a log to the weights it started from.

    The result equals what the engine would have saved after the same number of updates: masters
    in the log's store format with their folds and rounding, then rounded to nearest in each
    parameter's dtype. Tensors the log does not train are passed on as they are.

    Args:
        base: A folder with safetensors, a name of the hub, a dict of tensors, or a model. A
            model is updated in place; folders and dicts are left alone.
        log: The log or its path.
        upto: Number of updates to apply; ``None`` applies all.
        device: Where to compute; default: CUDA if there is any.
        out: Folder to write (safetensors sharded as the base, config and tokenizer copied); it
            appears only when complete.
        progress: Show a progress bar.

    Returns:
        The path of ``out`` if given; else the model for a model, a dict of tensors otherwise.

    Raises:
        LogError: The log is damaged before ``upto``, or belongs to other weights, another
            parameter table or another noise generator; the message says which.
        FileExistsError: ``out`` exists and is not empty.
    """
    if not isinstance(log, UpdateLog):
        with UpdateLog.open(log) as opened:
            return replay(base, opened, upto=upto, device=device, out=out, progress=progress)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    header = LogHeader.from_dict(log.header)
    records = sound_records(log, upto)
    check_generator(header, device)
    if isinstance(base, torch.nn.Module):
        return _replay_model(base, header, records, device, out, progress)
    source: Any = base
    if isinstance(base, (str, os.PathLike)):
        source = TensorFolder(_resolve(base))
    names = _match(header, source)
    work = _Replayed(source, header, names, records, device, progress)
    with work:
        if out is not None:
            return _write(source, work, Path(out))
        return {name: work.tensor(name) for name in source}


def sound_records(log: UpdateLog, upto: int | None = None) -> np.ndarray:
    """Return the records of the first ``upto`` updates, all checked.

    Flushes after the last of these updates are left out, unless ``upto`` is ``None``.

    Raises:
        LogError: One of them is damaged, or there are fewer. A torn tail is no damage here: what
            it cut off was never acknowledged.
    """
    report = log.verify()
    records = log.records[: report.records]
    if upto is not None:
        if not 0 <= upto <= report.updates:
            raise LogError(f"{log.path}: expected upto in 0..{report.updates}, got {upto}")
        updates = np.flatnonzero((records["flags"] & FLUSH) == 0)
        records = records[: int(updates[upto - 1]) + 1 if upto else 0]
    if report.usable < len(records):
        first = report.damage[0]
        raise LogError(
            f"{log.path}: {first.message}; the {report.usable} records before it are sound: replay "
            "with a smaller upto, or 'zo2 log truncate' the file"
        )
    if report.torn_bytes:
        logger.warning("%s: %s, ignored", log.path, report.damage[-1].message)
    return records


def check_generator(header: LogHeader, device: torch.device) -> None:
    """Refuse a log whose noise this machine does not reproduce.

    Raises:
        LogError: The first 4096 draws of the fixed key differ.
    """
    found = rng_fingerprint(header.dist, arithmetic=header.arithmetic, device=device)
    if found != header.rng:
        hint = (
            "MeZO arithmetic uses torch's generator: replay on the kind of device that trained"
            if header.arithmetic == "mezo"
            else "use the version of shared-kernels that wrote it"
        )
        raise LogError(
            f"RNG fingerprint: the log's {header.dist} noise on {device} hashes to {header.rng}, "
            f"here to {found}, so its directions cannot be drawn again; {hint} "
            f"(written with {header.versions})"
        )


def check_base(entry: ParameterEntry, value: Tensor) -> Tensor:
    """Return a base tensor in the table's dtype, after checking it against its row.

    Raises:
        LogError: Another shape, noise id or hash.
    """
    from shared_kernels.random import param_uid

    if param_uid(entry.name) != entry.uid:
        raise LogError(
            f"parameter table: {entry.name!r} has uid {entry.uid:#010x}, its name gives "
            f"{param_uid(entry.name):#010x}; the table was changed"
        )
    if tuple(value.shape) != entry.shape:
        raise LogError(
            f"parameter table: {entry.name!r} has shape {entry.shape} in the log and "
            f"{tuple(value.shape)} in the base; use the model the log was made with"
        )
    cast = value.detach().to(entry.torch_dtype)
    found = hash_tensor(cast)
    if found != entry.hash:
        raise LogError(
            f"base hash: {entry.name!r} ({value.dtype}) hashes to {found}, the log expects "
            f"{entry.hash} of {entry.dtype}; these are not the weights the log started from"
        )
    return cast


def replay_parameter(
    entry: ParameterEntry,
    value: Tensor,
    header: LogHeader,
    records: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], Any] = lambda elements: None,
) -> Tensor:
    """Replay one parameter in the exact arithmetic.

    Args:
        entry: Its row of the table.
        value: Its base value, of the table's shape and dtype.
        header: The log's header.
        records: Sound records, see `sound_records`.
        device: Where to compute.
        advance: Told the number of elements finished.

    Returns:
        The new value, on the CPU, in the same dtype.
    """
    out = torch.empty(entry.shape, dtype=value.dtype)
    source, target = value.reshape(-1), out.view(-1)
    rows = max(1, len(records) * header.q)
    chunk = min(_CHUNK, max(_LEAST_CHUNK, _DRAWS_PER_CALL // rows)) // TILE * TILE
    for start in range(0, entry.numel, chunk):
        part = source[start : start + chunk].to(device)
        y = _replay_flat(entry, part, start, header, records)
        target[start : start + chunk] = y[: len(part)].to(value.dtype).cpu()
        advance(len(part))
    return out


def _replay_flat(
    entry: ParameterEntry, part: Tensor, start: int, header: LogHeader, records: np.ndarray
) -> Tensor:
    from shared_kernels.ops.zo import Segment, build_tile_table, zo_replay

    segment = Segment(uid=entry.uid, numel=len(part), decay=entry.decay, start=start)
    tiles = build_tile_table([segment], device=part.device)
    stored = torch.bfloat16 if entry.store == "bf16" else torch.float32
    master = torch.zeros(-(-len(part) // TILE) * TILE, dtype=stored, device=part.device)
    master[: len(part)] = part

    def apply(some: np.ndarray, rounding: str, dither_seed: int) -> None:
        keys, coefs = (torch.from_numpy(a).to(part.device) for a in update_rows(some))
        zo_replay(
            master,
            tiles,
            keys,
            coefs,
            dist=header.dist,
            rounding=rounding,
            dither_seed=dither_seed,
        )

    done = 0
    if entry.store == "bf16":
        for fold in folds(records, entry.unit, header.fold_every):
            apply(records[done : fold.stop], header.rounding, fold.dither_seed)
            done = fold.stop
        master = master.float()
    if done < len(records):
        apply(records[done:], "nearest", 0)
    return master


class _Replayed:
    """The tensors of a base after replay, computed one at a time as they are asked for."""

    def __init__(
        self,
        source: Any,
        header: LogHeader,
        names: dict[str, str],
        records: np.ndarray,
        device: torch.device,
        progress: bool,
    ) -> None:
        self._source = source
        self._header = header
        self._records = records
        self._device = device
        self._entries = {e.name: e for e in header.parameters}
        self._canonical = names
        self._tied: dict[str, Tensor] = {}
        self._uses: dict[str, int] = {}
        for canonical in names.values():
            self._uses[canonical] = self._uses.get(canonical, 0) + 1
        self._bar = tqdm(
            total=sum(e.numel for e in header.parameters),
            desc=f"replay {len(records)} records",
            unit="param",
            unit_scale=True,
            disable=not progress,
        )
        self._mezo: dict[str, Tensor] | None = None

    def __enter__(self) -> _Replayed:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def dtype(self, info: TensorInfo) -> torch.dtype:
        canonical = self._canonical.get(info.name)
        return self._entries[canonical].torch_dtype if canonical else info.dtype

    def tensor(self, name: str) -> Tensor:
        canonical = self._canonical.get(name)
        if canonical is None:
            return self._source[name]
        if canonical in self._tied:
            return self._tied[canonical]
        value = self._compute(canonical, name)
        if self._uses[canonical] > 1:
            self._tied[canonical] = value
        return value

    def _compute(self, canonical: str, name: str) -> Tensor:
        if self._header.arithmetic == "mezo":
            return self._mezo_result()[canonical]
        entry = self._entries[canonical]
        value = check_base(entry, self._source[name])
        return replay_parameter(
            entry,
            value,
            self._header,
            self._records,
            device=self._device,
            advance=self._bar.update,
        )

    def _mezo_result(self) -> dict[str, Tensor]:
        # torch's generator runs through all parameters in order, so none can be done alone.
        if self._mezo is None:
            stored = {canonical: name for name, canonical in self._canonical.items()}
            named = []
            for entry in self._header.parameters:
                value = check_base(entry, self._source[stored[entry.name]])
                named.append((entry.name, value.to(self._device, copy=True)))
            replay_mezo(named, self._header, self._records)
            self._bar.update(self._bar.total)
            self._mezo = {name: value.cpu() for name, value in named}
        return self._mezo


def replay_mezo(named: list[tuple[str, Tensor]], header: LogHeader, records: np.ndarray) -> None:
    """Replay a log of ``arithmetic="mezo"`` in place, restore rounding included.

    Args:
        named: All parameters of the table, in its order, on the device that draws.
        header: The log's header.
        records: Sound records. A skipped step still leaves its perturbations' rounding behind.
    """
    from zo2.reference import mezo_perturb, mezo_update

    decay = {entry.name for entry in header.parameters if entry.decay}
    for record in records[(records["flags"] & FLUSH) == 0]:
        seed = int(record["seed"])
        for scale in (1, -2, 1):
            mezo_perturb(named, seed=seed, scale=scale, eps=header.eps)
        if not int(record["flags"]) & SKIPPED:
            mezo_update(
                named,
                seed=seed,
                g=float(record["g"][0]),
                lr=float(record["lr"]),
                weight_decay=float(record["weight_decay"]),
                decay=decay,
            )


def _replay_model(
    model: Any,
    header: LogHeader,
    records: np.ndarray,
    device: torch.device,
    out: str | os.PathLike[str] | None,
    progress: bool,
) -> Any:
    params: dict[str, Tensor] = dict(model.named_parameters())
    _match(header, params)
    for entry in header.parameters:
        # All are checked before any is changed: a refused log leaves the model as it was.
        check_base(entry, params[entry.name])
        if params[entry.name].dtype != entry.torch_dtype:
            raise LogError(
                f"parameter table: {entry.name!r} is {params[entry.name].dtype} in the model and "
                f"{entry.dtype} in the log; load the model with dtype={entry.dtype}"
            )
    names = {entry.name: entry.name for entry in header.parameters}
    with _Replayed(params, header, names, records, device, progress) as work, torch.no_grad():
        for name in names:
            params[name].copy_(work.tensor(name))
    if out is None:
        return model
    with replacing_folder(out) as folder:
        model.save_pretrained(folder)
    return Path(out)


def _match(header: LogHeader, source: Any) -> dict[str, str]:
    """Map stored names to canonical names; both differ by tied names and a model prefix only."""
    found: dict[str, str] = {}
    stored = list(source)
    for entry in header.parameters:
        names = [n for n in (entry.name, *entry.aliases) if n in source]
        if not names:
            near = [
                n for n in stored if entry.name.endswith(f".{n}") or n.endswith(f".{entry.name}")
            ]
            names = near if len(near) == 1 else []
        if not names:
            raise LogError(
                f"parameter table: the base has no tensor {entry.name!r}; use the model the log "
                "was made with, or, if transformers renames its tensors while loading, pass the "
                "loaded model: zo2.replay(AutoModelForCausalLM.from_pretrained(...), log)"
            )
        found.update(dict.fromkeys(names, entry.name))
    return found


def _resolve(base: str | os.PathLike[str]) -> Path:
    path = Path(base)
    if path.is_dir() or not isinstance(base, str) or base.count("/") != 1 or base[0] in "./~":
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(base, allow_patterns=patterns))


def _write(source: Any, work: _Replayed, out: Path) -> Path:
    if isinstance(source, TensorFolder):
        shards, metadata = source.shards, source.metadata
    else:
        infos = [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in source.items()]
        shards, metadata = {WEIGHTS_NAME: infos}, {}
    shards = {
        file: [info._replace(dtype=work.dtype(info)) for info in infos]
        for file, infos in shards.items()
    }
    with replacing_folder(out) as folder:
        for file, infos in shards.items():
            tensors: Iterator[Tensor] = (work.tensor(info.name) for info in infos)
            write_safetensors(folder / file, infos, tensors, metadata.get(file))
        write_index(folder, shards)
        if isinstance(source, TensorFolder):
            copy_side_files(source.path, folder)
    return out
