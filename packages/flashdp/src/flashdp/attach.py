"""Find the private layers of a model, check every rule on the instance at hand, move them over."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashdp.collector import Collector, Group, Handle, Part, PrivateLayer
from flashdp.errors import PrivacyError
from flashdp.rules import Rule, find_rule, private_class
from flashdp.rules.expanded import FALLBACK
from flashdp.rules.matrix import FLATTENING
from flashdp.sharding import is_sharded, trouble, unsharded_type
from flashdp.units import Units

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Issue", "find_issues", "find_layers", "private_parameters", "restore", "take_over"]

_MIXING = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Issue:
    """Why a model cannot be trained privately as it is.

    Attributes:
        name: Module or parameter.
        reason: What is wrong.
        remedy: What to do.
    """

    name: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.name}: {self.reason}; {self.remedy}"


_COVER = (
    "freeze it with requires_grad_(False), cover it with flashdp.register_dp_rule, or allow one "
    "gradient per row with fallback=True"
)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    for name, module in model.named_modules():
        own = [n for n, p in module._parameters.items() if p is not None and p.requires_grad]
        if own:
            yield name, module, own


def _rule_for(module: nn.Module, own: list[str], *, fallback: bool) -> tuple[Rule | None, str]:
    rule = find_rule(module)
    why = f"no rule covers a {type(module).__name__}"
    if rule is not None:
        trouble = rule.unsupported(module)
        known = rule.name.startswith("registered") or set(own) <= {"weight", "bias"}
        if trouble is None and known:
            return rule, ""
        why = trouble or f"its parameters {own} are not those the {rule.name} rule knows"
    if fallback:
        trouble = FALLBACK.unsupported(module)
        if trouble is None:
            return FALLBACK, ""
        why = trouble
    return None, why


def find_issues(model: nn.Module, *, fallback: bool = False) -> list[Issue]:
    """Everything that can be seen without data: uncovered parameters, layers that mix units."""
    issues = []
    for name, module in model.named_modules():
        if isinstance(module, _MIXING) and (module.training or module.affine):
            issues.append(
                Issue(
                    name or type(module).__name__,
                    f"{type(module).__name__} mixes the units of a batch",
                    "replace it, for instance by nn.GroupNorm, or freeze it in eval mode",
                )
            )
    probed: dict[Any, str | None] = {}
    for name, module, own in _owners(model):
        if isinstance(module, _MIXING):
            continue
        rule, why = _rule_for(module, own, fallback=fallback)
        if rule is None:
            shown = [f"{name}.{n}" if name else n for n in own]
            issues.append(Issue(", ".join(shown), why, _COVER))
            continue
        if issue := _sharding_issue(module, name, own):
            issues.append(issue)
            continue
        if rule is FALLBACK:
            continue
        if (difference := _probed(module, rule, own, probed)) is not None:
            issues.append(
                Issue(
                    name,
                    f"the {rule.name} rule and autograd disagree on this {type(module).__name__} "
                    f"({difference})",
                    _COVER,
                )
            )
    return issues


def _sharding_issue(module: nn.Module, name: str, own: list[str]) -> Issue | None:
    for local in own:
        param: Any = module._parameters[local]
        if is_sharded(param) and (why := trouble(param)):
            remedy = "shard the model by torch.distributed.fsdp.fully_shard alone, without offload"
            return Issue(f"{name}.{local}" if name else local, why, remedy)
    return None


def find_layers(model: nn.Module, *, fallback: bool = False) -> list[tuple[PrivateLayer, Rule]]:
    """Return every private layer with its rule.

    Raises:
        PrivacyError: Something trainable is not covered, or mixes units; every case is listed.
        ValueError: Nothing is trainable.
    """
    if issues := find_issues(model, fallback=fallback):
        raise PrivacyError(
            "the model cannot be trained privately as it is:\n"
            + "\n".join(f"- {issue}" for issue in issues)
        )
    modules = dict(model.named_modules())
    found = []
    for name, module, own in _owners(model):
        rule, _ = _rule_for(module, own, fallback=fallback)
        assert rule is not None
        parent = modules.get(name.rpartition(".")[0])
        names = {local: f"{name}.{local}" if name else local for local in own}
        flattened = parent is not None and unsharded_type(parent).__name__ in FLATTENING
        found.append((PrivateLayer(name, module, names, rule.name, flattened), rule))
    if not found:
        raise ValueError(
            "no parameter of the model requires a gradient; unfreeze what is to be trained"
        )
    return found


def private_parameters(
    layers: Sequence[Any], optimizer: torch.optim.Optimizer
) -> dict[nn.Parameter, str]:
    """Return the private parameters in a fixed order, with their full names.

    Raises:
        ValueError: The optimizer holds other parameters.
    """
    params: dict[nn.Parameter, str] = {}
    for layer in layers:
        for local, full in layer.names.items():
            params.setdefault(layer.parameter(local), full)
    held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if strangers := held - params.keys():
        shapes = [tuple(p.shape) for p in list(strangers)[:3]]
        raise ValueError(
            f"the optimizer holds {len(strangers)} parameters that are not the model's (shapes "
            f"{shapes}): they would train without privacy"
        )
    return {p: name for p, name in params.items() if p in held}


def take_over(layers: list[tuple[PrivateLayer, Rule]], collector: Collector) -> None:
    """Move each module to its private class."""
    handle = Handle(collector)
    for layer, rule in layers:
        layer.module.__dict__["_dp_handle"] = handle
        layer.module.__class__ = private_class(type(layer.module), rule.mixin)


def restore(model: nn.Module) -> None:
    """Move every module back to its own class."""
    for module in model.modules():
        original = vars(type(module)).get("_dp_original")
        if original is not None:
            module.__class__ = original
            module.__dict__.pop("_dp_handle", None)


@torch.no_grad()
def _twin(module: nn.Module) -> nn.Module:
    """Copy a module; a sharded one as it would be whole, with other values."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(_fresh(p.shape)) for p in module.parameters() if is_sharded(p)
    }
    whole = module
    if type(module) is not (original := unsharded_type(module)):
        # Without what shards: the class, its state, and the hooks that gather and free parameters.
        whole = original.__new__(original)
        kept = {k: v for k, v in vars(module).items() if not k.startswith("__composable_api")}
        whole.__dict__.update(kept)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            whole.__dict__[kind] = OrderedDict(
                (key, hook)
                for key, hook in vars(module)[kind].items()
                if type(getattr(hook, "__self__", None)).__name__ != "FSDPState"
            )
    twin = copy.deepcopy(whole, known).float().cpu()
    for param in twin.parameters():
        param.requires_grad_(False)
    return twin


def _fresh(shape: torch.Size) -> torch.Tensor:
    """Return random values: a parameter at zero or one could hide a wrong rule.

    Large ones repeat a block of prime length, because draws for a vocabulary take seconds.
    """
    size = min(shape.numel(), 1_000_003)
    block = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.3
    return block.repeat(-(-shape.numel() // max(size, 1)))[: shape.numel()].view(shape)


def _probed(
    module: nn.Module, rule: Rule, own: list[str], known: dict[Any, str | None]
) -> str | None:
    """Return what `_probe` says, once for modules that nothing tells apart."""
    values = {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training"}
    plain = all(isinstance(v, bool | int | float | str | tuple | None) for v in values.values())
    hooked = any(v for n, v in vars(module).items() if n.endswith("_hooks"))
    if not plain or hooked or any(True for _ in module.children()):
        return _probe(module, rule, own)
    shapes = [(n, None if p is None else p.shape) for n, p in module._parameters.items()]
    shapes += [(n, None if b is None else b.shape) for n, b in module._buffers.items()]
    key = (type(module), rule.name, tuple(own), repr(shapes), repr(sorted(values.items())))
    if key not in known:
        known[key] = _probe(module, rule, own)
    return known[key]


def _probe(module: nn.Module, rule: Rule, own: list[str]) -> str | None:
    """Compare a rule with autograd on a copy of the module; None if they agree."""
    twin = _twin(module)
    for local in own:
        param = twin._parameters[local]
        assert param is not None
        twin._parameters[local] = nn.Parameter(_fresh(param.shape))
    x = rule.probe(module, torch.Generator().manual_seed(0))
    if x.is_floating_point():
        x.requires_grad_(True)
    try:
        plain = _gradients(twin, x, own)
        first = _gradients(twin, x, own, rows=1) if rule.copies else {}
        layer = PrivateLayer("probe", twin, {n: n for n in own}, rule.name)
        layer.parts = [Part(layer, tuple(own))]
        collector = Collector([layer], [Group(0, "probe", layer.parts)])
        collector.thresholds = torch.tensor([torch.inf])
        take_over([(layer, rule)], collector)
        collector.begin(Units.one_per_row(len(x), x.device))
        private, sums = _gradients(twin, x, own), collector.take()
        if rule.copies:
            # The others are padding now: what is left must be what the first row alone gives.
            mask = torch.arange(len(x)) < 1
            collector.begin(Units.one_per_row(len(x), x.device, mask))
            _gradients(twin, x, own)
        alone = collector.take()
    except PrivacyError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not torch.allclose(private["y"], plain["y"], rtol=1e-4, atol=1e-5):
        return "outputs differ"
    if "x" in plain and not torch.allclose(private["x"], plain["x"], rtol=1e-4, atol=1e-5):
        return "input gradients differ"
    pairs = [(sums, plain, "gradients of {} differ")]
    if rule.copies:
        pairs.append((alone, first, "a row's own gradients of {} differ"))
    for found, expected, what in pairs:
        for local in own:
            got = found.get(layer.parameter(local))
            if got is None or not torch.allclose(got, expected[local], rtol=1e-3, atol=1e-4):
                return what.format(local)
    return None


def _gradients(
    module: nn.Module, x: torch.Tensor, own: list[str], *, rows: int | None = None
) -> dict[str, Any]:
    """Return the output and its gradients for random weights, of the first ``rows`` only."""
    x.grad = None
    with torch.enable_grad():
        y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    if rows is not None:
        weights[rows:] = 0
    torch.autograd.backward(y, weights)
    found: dict[str, Any] = {"y": y.detach()}
    if x.grad is not None:
        found["x"] = x.grad
    for local in own:
        param = module._parameters[local]
        assert param is not None
        if param.grad is not None:
            found[local], param.grad = param.grad, None
    return found
