"""Whether a model can be trained privately, from its configuration: no weights are loaded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashdp.attach import Issue, find_issues, find_layers
from flashdp.rules.base import find_rule

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CheckResult", "CoveredLayers", "check_model", "outline"]


@dataclass(frozen=True)
class CoveredLayers:
    """Layers that nothing but their number in the model tells apart.

    Attributes:
        name: Of the modules, numbers replaced by ``*``.
        kind: Their class.
        shape: Of their weight, or of their only parameter.
        rule: That covers them; empty if none does.
        count: How many there are.
        parameters: Trainable, of all of them; a tied one counts where it is met first.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rule: str
    count: int
    parameters: int


@dataclass(frozen=True)
class CheckResult:
    """What `check_model` found.

    Attributes:
        layers: All layers with trainable parameters, in the order of the model.
        issues: Why the model is refused; empty if it is not.
        parameters: Trainable parameters.
        frozen: Parameters that are not trained.
    """

    layers: tuple[CoveredLayers, ...]
    issues: tuple[Issue, ...]
    parameters: int
    frozen: int

    @property
    def passed(self) -> bool:
        """Whether the model can be made private as it is."""
        return not self.issues

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "passed": self.passed,
            "parameters": self.parameters,
            "frozen": self.frozen,
            "layers": [asdict(layer) for layer in self.layers],
            "issues": [asdict(issue) for issue in self.issues],
        }


def check_model(model: nn.Module, *, fallback: bool = False) -> CheckResult:
    """List the layers of a model with their rules, and what `make_private` would refuse.

    Every kind of layer is compared with autograd on random values, as `make_private` does with the
    layers themselves.

    Args:
        model: On any device. Parameters on the meta device are given one shared zero as storage,
            so that a model of any size takes no memory; they are of no other use afterwards.
        fallback: Allow one gradient per row where no rule fits.
    """
    _give_storage(model)
    issues = find_issues(model, fallback=fallback)
    refused = {name for issue in issues for name in issue.name.split(", ")}
    rules: dict[nn.Module, str] = {}
    if not issues and any(p.requires_grad for p in model.parameters()):
        rules = {layer.module: rule.name for layer, rule in find_layers(model, fallback=fallback)}
    seen: set[nn.Parameter] = set()
    found: dict[tuple, list[int]] = {}
    for name, module, own in _owners(model):
        rule = rules.get(module, "")
        if not rule and name not in refused and not refused & {f"{name}.{n}" for n in own}:
            known = find_rule(module)
            rule = known.name if known else "fallback"
        shape = tuple(own.get("weight", next(iter(own.values()))).shape)
        key = (re.sub(r"\d+", "*", name), type(module).__name__, shape, rule)
        counts = found.setdefault(key, [0, 0])
        counts[0] += 1
        counts[1] += sum(p.numel() for p in own.values() if p not in seen)
        seen |= set(own.values())
    return CheckResult(
        tuple(CoveredLayers(*key, *counts) for key, counts in found.items()),
        tuple(issues),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters() if not p.requires_grad),
    )


def outline(source: str, *, lora_rank: int | None = None) -> nn.Module:
    """Return a causal language model of transformers without its weights, on the meta device.

    Args:
        source: A folder with a ``config.json``, such a file, or a name on the Hugging Face hub,
            of which only the configuration is read.
        lora_rank: Freeze it, and give every matrix but the head a LoRA adapter of this rank.

    Raises:
        ImportError: transformers is not installed, or peft, where an adapter is asked for.
        ValueError: There is no configuration there, or it is not one of a causal language model;
            or the rank is below 1.
    """
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {lora_rank}")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "models are read by transformers: pip install 'flashdp[trainer]'"
        ) from error
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "" if Path(source).exists() else "; there is no such file or folder either"
        raise ValueError(
            f"MODEL: expected the configuration of a causal language model at {source!r}: "
            f"{reason}{hint}"
        ) from error
    return model if lora_rank is None else _adapted(model, lora_rank)


def _adapted(model: Any, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("adapters are made by peft: pip install 'flashdp[peft]'") from error
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    for name, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
        if own:
            yield name, module, own


@torch.no_grad()
def _give_storage(model: nn.Module) -> None:
    """Replace tensors on the meta device by zeros that all share one element."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_meta:
                if param not in known:
                    zeros = torch.zeros((), dtype=param.dtype).expand(param.shape)
                    known[param] = nn.Parameter(zeros, requires_grad=param.requires_grad)
                module._parameters[name] = known[param]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
