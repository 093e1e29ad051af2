"""What a log is tied to: the base weights, the parameter table, and the noise generator.

A log applied to other weights, or with another noise stream, gives a wrong model without any
error. Hence its header names each parameter's shape, dtype, noise id and the hash of its base
value, and a hash of the generator's output.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from zo2.log import LogError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from zo2.config import ZOConfig

FORMAT = 1
STORES = ("fp32", "bf16x2", "bf16", "fp16")

_FINGERPRINT_SEED = 0x5A4F32_53454544
_FINGERPRINT_UID = 0x54454E46
_FINGERPRINT_DRAWS = 4096


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """One row of the parameter table.

    Attributes:
        name: Canonical name: the first under which ``named_parameters`` gives the tensor.
        shape: Full logical shape.
        dtype: Dtype the model computes in, for example ``"bfloat16"``.
        uid: Id of the parameter's noise stream, `shared_kernels.random.param_uid` of the name.
        decay: Whether weight decay applies.
        unit: Index of the unit (block) the parameter folds with.
        store: How the engine kept it: one of `STORES`; ``"fp16"`` with MeZO arithmetic only.
        hash: `hash_tensor` of the value before the first update.
        aliases: Other names of the same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    uid: int
    decay: bool
    unit: int
    store: str
    hash: str
    aliases: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        return getattr(torch, self.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class LogHeader:
    """The header of an update log, checked.

    Attributes:
        parameters: The table of everything the log trains, in model order.
        dist: Noise distribution.
        eps: Perturbation scale.
        q: Directions per step.
        arithmetic: ``"exact"`` or ``"mezo"``.
        fold_every: K, see `zo2.updates.folds`.
        rounding: How ``"bf16"`` stores round when they fold.
        rng: `rng_fingerprint` of the machine that wrote the log.
        run_seed: Seed of the run, from which each step's seed was derived.
        versions: Versions of the libraries that wrote it.
    """

    parameters: tuple[ParameterEntry, ...]
    dist: Literal["gaussian", "rademacher"]
    eps: float
    q: int
    arithmetic: Literal["exact", "mezo"]
    fold_every: int
    rounding: Literal["nearest", "stochastic"]
    rng: str
    run_seed: int
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, what `zo2.UpdateLog.create` takes."""
        rows = [
            {**vars(p), "shape": list(p.shape), "aliases": list(p.aliases)} for p in self.parameters
        ]
        return {"format": FORMAT, **vars(self), "parameters": rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LogHeader:
        """Check a parsed header.

        Raises:
            LogError: Another format version, a missing or unknown key, or a wrong value.
        """
        values = dict(values)
        found = values.pop("format", None)
        if found != FORMAT:
            raise LogError(
                f"log header: expected format {FORMAT}, got {found!r}; use the zo2 that wrote it"
            )
        parameters = _checked(values, "parameters", list)
        try:
            table = tuple(
                ParameterEntry(**p | {k: tuple(p[k]) for k in ("shape", "aliases")})
                for p in parameters
            )
            header = cls(**cast("dict[str, Any]", {**values, "parameters": table}))
        except (TypeError, KeyError) as error:
            raise LogError(f"log header: a key is missing or unknown: {error}") from None
        header._check()
        return header

    def _check(self) -> None:
        values = vars(self)
        for name, kind in (
            ("q", int),
            ("fold_every", int),
            ("run_seed", int),
            ("rng", str),
            ("eps", float),
        ):
            _checked(values, name, kind)
        for name, options in (
            ("dist", ("gaussian", "rademacher")),
            ("arithmetic", ("exact", "mezo")),
            ("rounding", ("nearest", "stochastic")),
        ):
            if values[name] not in options:
                raise LogError(f"log header: expected {name} in {options}, got {values[name]!r}")
        if self.fold_every < 1:
            raise LogError(f"log header: expected fold_every of 1 or more, got {self.fold_every}")
        for p in self.parameters:
            _check_entry(p)
        names = [n for p in self.parameters for n in (p.name, *p.aliases)]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise LogError(f"log header: parameter {twice!r} is listed twice")


def _checked(values: dict[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise LogError(f"log header: expected {name} of type {kind.__name__}, got {value!r:.80}")
    return value


def _check_entry(p: ParameterEntry) -> None:
    texts = (p.name, p.dtype, p.store, p.hash, *p.aliases)
    if not all(isinstance(text, str) for text in texts):
        raise LogError(f"log header: expected strings in the row of parameter {p.name!r:.80}")
    whole = (*p.shape, p.uid, p.unit)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in whole):
        raise LogError(f"log header: bad shape, uid or unit in the row of parameter {p.name!r}")
    if p.dtype not in ("float32", "bfloat16", "float16") or p.store not in STORES:
        raise LogError(
            f"log header: parameter {p.name!r} has dtype {p.dtype!r} and store {p.store!r}; "
            f"expected float32, bfloat16 or float16, kept as one of {STORES}"
        )


def make_header(
    parameters: Iterable[ParameterEntry],
    zo: ZOConfig,
    *,
    fold_every: int,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Build the header of a new log.

    Args:
        parameters: The table, see `parameter_entries`.
        zo: The run's estimator.
        fold_every: Steps between folds, as resolved by the engine.
        rounding: How ``"bf16"`` stores round.
        device: Device that draws the run's noise.
    """
    return LogHeader(
        parameters=tuple(parameters),
        dist=zo.dist,
        eps=zo.eps,
        q=zo.q,
        arithmetic=zo.arithmetic,
        fold_every=fold_every,
        rounding=rounding,
        rng=rng_fingerprint(zo.dist, arithmetic=zo.arithmetic, device=device),
        run_seed=zo.seed,
        versions=library_versions(),
    ).to_dict()


def parameter_entries(
    tensors: Sequence[tuple[str, Tensor]],
    *,
    units: dict[str, int],
    decay: Iterable[str],
    stores: dict[str, str],
    aliases: dict[str, tuple[str, ...]] | None = None,
    threads: int | None = None,
) -> list[ParameterEntry]:
    """Describe and hash trainable parameters, before the first update.

    Args:
        tensors: Canonical names and values, in the dtype the model computes in.
        units: Unit of each name.
        decay: Names to which weight decay applies.
        stores: Store codec of each name.
        aliases: Other names of tied tensors, by canonical name.
        threads: Hashing threads; default: the machine's cores, at most 16.
    """
    from shared_kernels.random import param_uid

    decaying, aliases = set(decay), aliases or {}
    hashes = hash_tensors([t for _, t in tensors], threads=threads)
    return [
        ParameterEntry(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            uid=param_uid(name),
            decay=name in decaying,
            unit=units[name],
            store=stores[name],
            hash=digest,
            aliases=tuple(aliases.get(name, ())),
        )
        for (name, tensor), digest in zip(tensors, hashes, strict=True)
    ]


def hash_tensor(tensor: Tensor) -> str:
    """Return 128 bits of BLAKE2b over the tensor's contiguous little-endian bytes, in hex."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        array = array.reshape(-1, flat.element_size())[:, ::-1].copy()
    return hashlib.blake2b(array, digest_size=16).hexdigest()


def hash_tensors(tensors: Sequence[Tensor], *, threads: int | None = None) -> list[str]:
    """Hash several tensors in threads (hashing releases the interpreter lock)."""
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_tensor, tensors))


def rng_fingerprint(
    dist: str, *, arithmetic: str = "exact", device: torch.device | str = "cpu"
) -> str:
    """Return 128 bits of BLAKE2b over the first 4096 draws of a fixed key, in hex.

    Args:
        dist: Noise distribution.
        arithmetic: ``"mezo"`` takes torch's own generator, ``"exact"`` ours.
        device: Device that draws.
    """
    if arithmetic == "mezo":
        generator = torch.Generator(device).manual_seed(_FINGERPRINT_SEED)
        draws = torch.normal(0.0, 1.0, (_FINGERPRINT_DRAWS,), generator=generator, device=device)
    else:
        from shared_kernels.random import noise

        draws = noise(
            _FINGERPRINT_DRAWS,
            seed=_FINGERPRINT_SEED,
            uid=_FINGERPRINT_UID,
            dist=dist,
            device=device,
        )
    return hash_tensor(draws)


def library_versions() -> dict[str, str]:
    """Return the versions of what determines a run's numbers."""
    versions = {"python": platform.python_version()}
    for name in ("zo2", "shared-kernels", "torch", "triton", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
