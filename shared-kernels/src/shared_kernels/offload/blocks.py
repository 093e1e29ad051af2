"""Find the repeated blocks of a model and the parameters each of them owns.

A *unit* is what the engine moves as a whole: one block (a decoder layer, an encoder layer), or the
*resident* unit, which holds every parameter outside the blocks and never leaves the device.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["BlockPlan", "ParamRef", "Unit", "discover_blocks"]


@dataclass(frozen=True)
class ParamRef:
    """One parameter, under its canonical name (the first one ``named_parameters`` gives it)."""

    name: str
    parameter: nn.Parameter = field(repr=False, compare=False)

    @property
    def shape(self) -> torch.Size:
        """Logical shape."""
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the model computes in."""
        return self.parameter.dtype

    @property
    def trainable(self) -> bool:
        """Whether ``requires_grad`` is set."""
        return self.parameter.requires_grad

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.parameter.numel()

    @property
    def nbytes(self) -> int:
        """Bytes in the compute dtype."""
        return self.parameter.numel() * self.parameter.element_size()


@dataclass(frozen=True)
class Unit:
    """A block and the parameters that travel with it. ``module`` is None for the resident unit."""

    index: int
    name: str
    module: nn.Module | None = field(repr=False, compare=False)
    params: tuple[ParamRef, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in their compute dtypes."""
        return sum(p.nbytes for p in self.params)


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of a model in registration order, and the resident unit after them.

    ``rule`` names the discovery rule that found the blocks, for messages and plans.
    """

    blocks: tuple[Unit, ...]
    resident: Unit
    rule: str

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units: the blocks, then the resident one."""
        return (*self.blocks, self.resident)

    def unit_of(self) -> dict[str, int]:
        """Map each canonical parameter name to the index of its unit."""
        return {p.name: unit.index for unit in self.units for p in unit.params}


def discover_blocks(
    model: nn.Module,
    spec: str | list[str] | tuple[str, ...] | None = None,
    resident: list[str] | tuple[str, ...] = (),
) -> BlockPlan:
    """Split a model into blocks that can be streamed one by one, and the rest.

    The first rule that finds something wins: ``spec``; the outermost
    ``transformers.GradientCheckpointingLayer`` modules; the classes in ``_no_split_modules``; the
    largest ``nn.ModuleList`` whose members share one class.

    Args:
        model: Any module; its parameters may be on the meta device.
        spec: Regular expression(s) matched in full against module names; the outermost matches
            become blocks.
        resident: Regular expressions of module names that stay on the device although a rule
            would make them blocks.

    Returns:
        The plan. A parameter shared by two units (tied weights, layers used more than once under
        two names) belongs to the resident unit.

    Raises:
        ValueError: No block was found, a pattern matches nothing, a parameter is quantised, or two
            different parameters overlap in memory.
    """
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    if spec is not None:
        chosen, rule = _by_pattern(names, [spec] if isinstance(spec, str) else list(spec)), "spec"
    else:
        chosen, rule = _by_rules(model, names)
    for pattern in resident:
        kept = [m for m in chosen if not re.fullmatch(pattern, names[m])]
        if len(kept) == len(chosen):
            raise ValueError(
                f"resident pattern {pattern!r} matches none of the blocks "
                f"{[names[m] for m in chosen[:3]]}...; give a regular expression for a block name"
            )
        chosen = kept
    if not chosen:
        raise ValueError(
            f"no repeated blocks found in {type(model).__name__}; name them with "
            "blocks='model.layers.[0-9]+' (a regular expression for module names)"
        )
    _refuse_overlaps(model)
    return _assemble(model, chosen, names, rule)


def _by_pattern(names: dict[nn.Module, str], patterns: list[str]) -> list[nn.Module]:
    found: list[nn.Module] = []
    ordered = sorted(names.items(), key=lambda item: list(names).index(item[0]), reverse=True)
    for pattern in patterns:
        hits = [m for m, name in ordered if name and re.fullmatch(pattern, name)]
        if not hits:
            raise ValueError(
                f"block pattern {pattern!r} matches no module; modules are named like "
                f"{[n for n in names.values() if n][-3:]}"
            )
        found.extend(h for h in hits if h not in found)
    return _outermost(found, names)


def _by_rules(model: nn.Module, names: dict[nn.Module, str]) -> tuple[list[nn.Module], str]:
    modules = list(model.modules())
    layers = sys.modules.get("transformers.modeling_layers")
    if layers is not None:
        base = layers.GradientCheckpointingLayer
        chosen = _outermost([m for m in modules if isinstance(m, base)], names)
        if chosen:
            return chosen, "GradientCheckpointingLayer"
    classes = {c for m in modules for c in (getattr(m, "_no_split_modules", None) or ())}
    chosen = _outermost([m for m in modules if type(m).__name__ in classes], names)
    if chosen:
        return chosen, "_no_split_modules"
    lists = [
        m
        for m in modules
        if isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(c) for c in m}) == 1
    ]
    if not lists:
        return [], "none"
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(largest), "ModuleList"


def _outermost(modules: list[nn.Module], names: dict[nn.Module, str]) -> list[nn.Module]:
    prefixes = {names[m] for m in modules}

    def nested(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:k]) in prefixes for k in range(1, len(parts)))

    return [m for m in modules if not nested(names[m])]


def _assemble(
    model: nn.Module, chosen: list[nn.Module], names: dict[nn.Module, str], rule: str
) -> BlockPlan:
    uses = Counter(id(p) for m in chosen for p in m.parameters())
    inside = {id(p) for m in chosen for p in m.parameters()}
    every, within = _registrations([model]), _registrations(chosen)
    # A parameter also registered outside its block, or in two blocks, cannot leave with either.
    shared = {key for key in inside if uses[key] > 1 or every[key] > within[key]}
    canonical = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if hasattr(p, "quant_state") or (p.requires_grad and p.dtype not in _TRAINABLE):
            raise ValueError(
                f"parameter {name!r} is {type(p).__name__} of dtype {p.dtype}, expected float32, "
                "bfloat16 or float16 where it is trained: load the model in one of these dtypes, "
                "or freeze the parameter with requires_grad_(False)"
            )
    blocks = []
    for module in chosen:
        params = tuple(
            ParamRef(canonical[id(p)], p) for p in module.parameters() if id(p) not in shared
        )
        if params:
            blocks.append(Unit(len(blocks), names[module], module, params))
    taken = {id(p.parameter) for unit in blocks for p in unit.params}
    rest = tuple(ParamRef(n, p) for n, p in model.named_parameters() if id(p) not in taken)
    return BlockPlan(tuple(blocks), Unit(len(blocks), "resident", None, rest), rule)


def _registrations(roots: list[nn.Module]) -> Counter[int]:
    """Count in how many places each parameter is registered, a module used twice counting once."""
    return Counter(
        id(p)
        for root in roots
        for module in root.modules()
        for p in module._parameters.values()
        if p is not None
    )


def _refuse_overlaps(model: nn.Module) -> None:
    spans: list[tuple[int, int, str]] = []
    for name, p in model.named_parameters():
        if p.is_meta or p.numel() == 0 or p.untyped_storage().nbytes() == 0:
            continue
        start = p.data_ptr()
        spans.append((start, start + _extent(p), name))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"parameters {first!r} and {second!r} are different tensors over the same memory; "
                "tie them as one nn.Parameter, or clone one of them"
            )


def _extent(p: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    return (last + 1) * p.element_size()
