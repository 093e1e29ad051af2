"""The registry of rules, and how a module instance is made to record.

An instance is moved to a subclass of its own class, made for it: `isinstance`, the names in a state
dict, PEFT and `save_pretrained` see no difference, and moving it back undoes everything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashdp.sharding import unsharded_type

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    from flashdp.collector import Handle, Use

__all__ = ["Rule", "find_rule", "handle_of", "private_class", "register_dp_rule"]


@dataclass(frozen=True)
class Rule:
    """How one kind of module is covered.

    Attributes:
        name: For reports and plans.
        matches: Whether the rule is meant for a module.
        unsupported: Why this instance cannot be covered, or None.
        mixin: Class whose forward records; it stands right before the class whose forward does the
            arithmetic, so that a subclass's own additions still run.
        probe: Makes an input for the attach-time comparison with autograd: two rows of three
            tokens where the module takes tokens.
        copies: Whether its forward works on copies of the parameters, one per row: that each row
            uses its own is then compared as well.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    mixin: type
    probe: Callable[[nn.Module, torch.Generator], Tensor]
    unsupported: Callable[[nn.Module], str | None] = lambda module: None
    copies: bool = False


_RULES: list[Rule] = []


def register(rule: Rule) -> Rule:
    """Add a rule; later ones are asked first."""
    _RULES.insert(0, rule)
    return rule


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for a module, or None."""
    _load()
    return next((rule for rule in _RULES if rule.matches(module)), None)


def register_dp_rule(
    module_type: type[nn.Module],
    forward: Callable[..., Any],
    *,
    probe: Callable[[nn.Module, torch.Generator], Tensor],
) -> None:
    """Cover a module type whose parameters are small, by saying how it uses them.

    Args:
        module_type: The class; subclasses are not covered.
        forward: ``forward(module, parameters, *args, **kwargs)``. ``parameters`` maps each
            trainable parameter's name in the module to one copy per row of the batch, shape
            (rows, *shape), and everything else is the module's own. The result must be what the
            module's forward gives; row i must use copy i alone. Gradients are kept per row, so
            memory grows with rows times parameters.
        probe: ``probe(module, generator)`` gives an input of two rows; when a model is made
            private, every instance is compared with autograd on it.

    Example:
        >>> def scale(module, parameters, x):
        ...     return x * parameters["weight"][:, None]
        >>> probe = lambda module, generator: torch.randn(2, 3, 8, generator=generator)
        >>> register_dp_rule(Scale, scale, probe=probe)  # doctest: +SKIP
    """
    from flashdp.rules.expanded import user_mixin

    register(
        Rule(
            f"registered for {module_type.__name__}",
            lambda module: _plain_type(module) is module_type,
            user_mixin(forward),
            probe,
            copies=True,
        )
    )


@functools.cache
def _load() -> None:
    from flashdp.rules import conv, expanded, matrix, table  # noqa: F401


def _plain_type(module: nn.Module) -> type:
    return getattr(type(module), "_dp_original", unsharded_type(module))


@functools.cache
def private_class(original: type, mixin: type) -> type:
    """Make the subclass of ``original`` whose innermost forward is the mixin's."""
    shared = (c for c in original.__mro__ if c in mixin.__mro__ and c is not object)
    base = next(shared, original)
    if base is original or "forward" not in _between(original, base):
        bases: tuple[type, ...] = (mixin, original)
    else:
        bases = (original, mixin)
    return type(f"Private{original.__name__}", bases, {"_dp_original": original})


def _between(original: type, base: type) -> set[str]:
    names: set[str] = set()
    for cls in original.__mro__:
        if cls is base:
            break
        names |= vars(cls).keys()
    return names


def handle_of(module: nn.Module) -> Handle:
    """The module's way to its collector."""
    return module.__dict__["_dp_handle"]


def trainable(module: nn.Module, names: Sequence[str] = ("weight", "bias")) -> set[str]:
    """Names of a module's own parameters that are trained."""
    own = module._parameters
    return {n for n in names if (p := own.get(n)) is not None and p.requires_grad}


def open_use(module: nn.Module) -> Use | None:
    """Announce a forward; None where nothing is to be recorded."""
    return handle_of(module).open(module)
