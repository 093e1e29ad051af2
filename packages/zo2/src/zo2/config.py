"""Configuration of a zeroth-order run: what is estimated, where weights live, what is trained.

Plain frozen dataclasses, checked when they are made, convertible to and from JSON. This module
imports neither torch nor numpy, because the command line reads it to print its help.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, TypeVar, cast

_T = TypeVar("_T", bound="_JSONConfig")

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": 2**10,
    "m": 10**6,
    "mb": 10**6,
    "mib": 2**20,
    "g": 10**9,
    "gb": 10**9,
    "gib": 2**30,
    "t": 10**12,
    "tb": 10**12,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")
_MAX_BYTES = 2**63 - 1

MAX_DIRECTIONS = 4096
"""Largest number of directions in one step; bounds the length of a log record."""


def parse_bytes(size: str | int) -> int:
    """Convert a memory size to bytes.

    Args:
        size: A number of bytes, or a string such as ``"8GiB"`` (binary units: KiB, MiB, GiB, TiB)
            or ``"8GB"`` (decimal units: kB, MB, GB, TB, or a single letter). Case is ignored.

    Returns:
        The size in bytes, rounded down.

    Raises:
        ValueError: The string is not a size, the unit is unknown, or the size is negative or
            beyond 2**63 - 1 bytes.
        TypeError: ``size`` is neither a string nor an integer.

    Example:
        >>> parse_bytes("8GiB"), parse_bytes("1.5 kB"), parse_bytes(4096)
        (8589934592, 1500, 4096)
    """
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise TypeError(
            f"expected a memory size as a string ('8GiB') or an integer (bytes), "
            f"got {size!r} of type {type(size).__name__}"
        )
    if isinstance(size, int):
        nbytes = size
    else:
        match = _SIZE.fullmatch(size[:64])
        unit = match.group(2).lower() if match else None
        if match is None or len(size) > 64:
            raise ValueError(
                f"expected a memory size such as '8GiB', '512MB' or 4096, got {size!r}"
            )
        if unit not in _UNITS:
            raise ValueError(
                f"unknown unit {match.group(2)!r} in memory size {size!r}: "
                "use B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
            )
        nbytes = int(Decimal(match.group(1)) * _UNITS[unit])
    if not 0 <= nbytes <= _MAX_BYTES:
        raise ValueError(f"expected a memory size between 0 and 2**63 - 1 bytes, got {size!r}")
    return nbytes


class _JSONConfig:
    """Conversion of a dataclass to and from plain JSON values, and the checks its fields share."""

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values (tuples become lists, nested configs dicts)."""
        return {
            f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(cast("Any", self))
        }

    @classmethod
    def from_dict(cls: type[_T], values: dict[str, Any]) -> _T:
        """Make a configuration from what `to_dict` returned, or from a parsed YAML or JSON file.

        Args:
            values: Field names and their values; absent fields take their defaults.

        Raises:
            ValueError: A key is not a field (the nearest field is suggested), or a value is
                refused by the field's check.
            TypeError: ``values`` is not a mapping, or a value has the wrong type.
        """
        if not isinstance(values, dict):
            raise TypeError(f"{cls.__name__}: expected a mapping of options, got {values!r}")
        hints = typing.get_type_hints(cls)
        kwargs: dict[str, Any] = {}
        for key, value in values.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"{cls.__name__} has no option {key!r}{hint}; it has: {', '.join(hints)}"
                )
            kind = hints[key]
            if isinstance(kind, type) and issubclass(kind, _JSONConfig) and isinstance(value, dict):
                value = kind.from_dict(value)
            elif isinstance(value, list):
                value = tuple(value)
            kwargs[key] = value
        return cls(**kwargs)

    def replace(self: _T, **changes: Any) -> _T:
        """Return a copy with some fields changed; the copy is checked again."""
        return dataclasses.replace(cast("Any", self), **changes)

    def _error(self, name: str, expected: str, remedy: str, kind: type[Exception]) -> Exception:
        value = getattr(self, name)
        return kind(f"{type(self).__name__}.{name}: expected {expected}, got {value!r}; {remedy}")

    def _number(self, name: str, expected: str, remedy: str, ok: Any, *, whole: bool) -> None:
        value = getattr(self, name)
        allowed = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise self._error(name, expected, remedy, TypeError)
        if not math.isfinite(value) or not ok(value):
            raise self._error(name, expected, remedy, ValueError)
        if not whole:
            object.__setattr__(self, name, float(value))

    def _choice(self, name: str) -> None:
        hint = typing.get_type_hints(type(self))[name]
        options = typing.get_args(hint)
        if getattr(self, name) not in options:
            listed = ", ".join(repr(option) for option in options)
            raise self._error(name, f"one of {listed}", "choose one of them", ValueError)

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise self._error(name, "true or false", "give a boolean", TypeError)

    def _size(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        try:
            parse_bytes(value)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{type(self).__name__}.{name}: {error}") from None

    def _names(self, name: str, *, what: str) -> None:
        value = getattr(self, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(self, name, value)
        if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
            raise self._error(name, f"a tuple of {what}", "list them as strings", TypeError)

    def _text(self, name: str, *, what: str, remedy: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str):
            raise self._error(name, what, remedy, TypeError)
        if not value:
            raise self._error(name, what, remedy, ValueError)


def _plain(value: Any) -> Any:
    if isinstance(value, _JSONConfig):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, (dict, types.MappingProxyType)):
        return {k: _plain(v) for k, v in value.items()}
    return value


@dataclass(frozen=True, kw_only=True)
class ZOConfig(_JSONConfig):
    """The zeroth-order estimator and update rule (MeZO-SGD by default).

    One step measures, for each of ``q`` directions z, the losses at θ + eps·z and θ - eps·z and
    updates θ ← θ - lr·(mean over directions of g·z + weight_decay·θ), with
    g = (loss₊ - loss₋) / (2·eps). Source: Malladi et al., "Fine-Tuning Language Models with Just
    Forward Passes", NeurIPS 2023, algorithm 1.

    Args:
        eps: Perturbation scale. MeZO's values: 1e-3 for full fine-tuning, 1e-2 for LoRA.
        q: Directions per step; each costs two forwards and no further weight upload.
        dist: Distribution of the direction's entries: standard normal, or ±1 with equal odds.
        weight_decay: λ in the update; biases and norms are left out.
        micro_batch_size: Examples per forward; a batch is split into parts of at most this size
            inside one weight upload. ``None`` runs the whole batch at once.
        arithmetic: ``"exact"`` perturbs out of place from unrounded weights; ``"mezo"`` repeats
            MeZO's in-place additions bit for bit, including what they fail to restore.
        seed: Seed of the run; step t's direction follows from it and t alone.
        clip_g: A step with |g| above this bound in any direction is recorded but not applied.
        train_mode: Run the probes with dropout active, both signs with the same masks.
    """

    eps: float = 1e-3
    q: int = 1
    dist: Literal["gaussian", "rademacher"] = "gaussian"
    weight_decay: float = 0.0
    micro_batch_size: int | None = None
    arithmetic: Literal["exact", "mezo"] = "exact"
    seed: int = 0
    clip_g: float | None = None
    train_mode: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        positive = "a finite number above 0"
        self._number("eps", positive, "MeZO uses 1e-3", lambda v: v > 0, whole=False)
        self._number(
            "q",
            f"a whole number from 1 to {MAX_DIRECTIONS}",
            "1 is MeZO's estimator",
            lambda v: 1 <= v <= MAX_DIRECTIONS,
            whole=True,
        )
        self._choice("dist")
        self._number(
            "weight_decay",
            "a finite number of at least 0",
            "0.0 turns it off",
            lambda v: v >= 0,
            whole=False,
        )
        if self.micro_batch_size is not None:
            remedy = "None runs the whole batch at once"
            self._number(
                "micro_batch_size", "None or at least 1", remedy, lambda v: v >= 1, whole=True
            )
        self._choice("arithmetic")
        self._number(
            "seed",
            "a whole number in [0, 2**64)",
            "0 is fine",
            lambda v: 0 <= v < 2**64,
            whole=True,
        )
        if self.clip_g is not None:
            remedy = "None applies every finite step"
            self._number("clip_g", f"None or {positive}", remedy, lambda v: v > 0, whole=False)
        self._flag("train_mode")
        if self.arithmetic == "mezo" and (self.q != 1 or self.dist != "gaussian"):
            raise ValueError(
                f"ZOConfig.arithmetic: 'mezo' repeats MeZO's own step, which has one gaussian "
                f"direction, got q={self.q} and dist={self.dist!r}; use arithmetic='exact', or "
                "q=1 with dist='gaussian'"
            )


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(_JSONConfig):
    """Where the weights live during training.

    Args:
        gpu: GPU memory for the run, bytes or ``"8GiB"``: as many blocks as fit stay resident.
            ``None`` streams every block.
        host: Host memory for the weight store; ``None`` takes what the machine's limits allow.
        store: How the host keeps weights: ``"fp32"`` (4 bytes each), ``"bf16x2"`` (the same fp32
            in two halves, of which the forward reads only the upper one), ``"bf16"`` (2 bytes,
            stochastically rounded when updates are folded in), or ``"auto"``.
        fold_every: Steps between write-backs of a block; updates in between are replayed on the
            device. ``"auto"`` takes as many as hide under the transfer.
        blocks: Name pattern(s) of the modules to stream; ``None`` finds the repeated blocks.
        resident: Name patterns of modules that must stay on the GPU.
        pin: ``"register"`` page-locks the store in place, ``"bounce"`` copies through small
            page-locked buffers, ``"none"`` uses pageable memory, ``"auto"`` tries them in order.
        prefetch: Blocks uploaded ahead of the one being computed.
    """

    gpu: str | int | None = None
    host: str | int | None = None
    store: Literal["auto", "fp32", "bf16x2", "bf16"] = "auto"
    fold_every: int | Literal["auto"] = "auto"
    blocks: str | tuple[str, ...] | None = None
    resident: tuple[str, ...] = ()
    pin: Literal["auto", "register", "bounce", "none"] = "auto"
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Check every field."""
        self._size("gpu")
        self._size("host")
        self._choice("store")
        if self.fold_every != "auto":
            self._number(
                "fold_every",
                "'auto' or a whole number from 1 to 65536",
                "1 writes a block back at every step",
                lambda v: 1 <= v <= 65536,
                whole=True,
            )
        if isinstance(self.blocks, str):
            self._text("blocks", what="a module name pattern", remedy="None finds the blocks")
        elif self.blocks is not None:
            self._names("blocks", what="module name patterns")
            if not self.blocks:
                raise self._error(
                    "blocks", "at least one pattern", "None finds the blocks", ValueError
                )
        self._names("resident", what="module name patterns")
        self._choice("pin")
        self._number(
            "prefetch",
            "a whole number from 1 to 64",
            "2 keeps the copy engine busy",
            lambda v: 1 <= v <= 64,
            whole=True,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_JSONConfig):
    """A fine-tuning run from files: what ``zo2 train`` takes.

    Args:
        model: A folder with a transformers model, or a name of the hub.
        data: Training examples: a ``.jsonl``, ``.json`` or ``.parquet`` file with ``text``, or
            ``prompt`` and ``completion``, or ``messages``.
        output_dir: Folder for the log, checkpoints and the final model.
        eval_data: Held-out examples of the same form; ``None`` evaluates nothing.
        lr: Learning rate.
        lr_scheduler: Any schedule of transformers, for example ``"constant"`` or ``"linear"``.
        steps: Optimizer steps.
        batch_size: Examples per step.
        max_length: Tokens kept of each example.
        dtype: Type the model is loaded in; ``"auto"`` takes the checkpoint's own.
        resume: Continue from the last checkpoint in ``output_dir``.
        zo: The estimator.
        offload: Where weights live.
        trainer: Any further ``transformers.TrainingArguments``, passed through unchanged.
    """

    model: str
    data: str
    output_dir: str = "zo2-run"
    eval_data: str | None = None
    lr: float = 1e-6
    lr_scheduler: str = "constant"
    steps: int = 1000
    batch_size: int = 16
    max_length: int = 1024
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    resume: bool = False
    zo: ZOConfig = field(default_factory=ZOConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field, and that no TrainingArguments value is given twice."""
        self._text("model", what="a model folder or name", remedy="give --model")
        self._text("data", what="a data file", remedy="give --data")
        self._text("output_dir", what="a folder", remedy="give --output-dir")
        if self.eval_data is not None:
            self._text("eval_data", what="a data file", remedy="None evaluates nothing")
        self._text("lr_scheduler", what="a schedule's name", remedy="'constant' is MeZO's")
        self._number(
            "lr", "a finite number above 0", "MeZO uses 1e-6", lambda v: v > 0, whole=False
        )
        for name in ("steps", "batch_size", "max_length"):
            self._number(
                name, "a whole number of at least 1", "give 1 or more", lambda v: v >= 1, whole=True
            )
        self._choice("dtype")
        self._flag("resume")
        for name, kind in (("zo", ZOConfig), ("offload", OffloadConfig)):
            if not isinstance(getattr(self, name), kind):
                raise self._error(
                    name, f"a {kind.__name__}", f"use {kind.__name__}(...)", TypeError
                )
        if not isinstance(self.trainer, dict):
            raise self._error(
                "trainer", "a mapping of TrainingArguments", "use name: value", TypeError
            )
        for key, own in _OWNED_ARGUMENTS.items():
            if key in self.trainer:
                raise ValueError(
                    f"TrainConfig.trainer: {key!r} is set by the option {own!r}; "
                    f"remove it from the trainer block and give {own} instead"
                )


_OWNED_ARGUMENTS = {
    "output_dir": "output_dir",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "weight_decay": "zo.weight_decay",
    "resume_from_checkpoint": "resume",
}
