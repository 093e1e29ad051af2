"""Parameters small enough to be given to every row as a copy of its own.

Norm layers: the forward runs with one copy of scale and shift per row of the batch, so autograd
hands back one gradient per row. Any other module can be covered so by `register_dp_rule`, or, with
`fallback=True`, by `torch.func.vmap` over the rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flashdp.records import RowsRecord
from flashdp.rules.base import Rule, open_use, register, trainable


class _PerRow(torch.autograd.Function):
    """A parameter, once per row; records its gradients."""

    @staticmethod
    def forward(ctx: Any, param, shape, local, use):
        ctx.local, ctx.use = local, use
        return use.units.expand(param.detach(), shape, flattened=use.layer.flattened)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        local = ctx.local

        def make(units):
            size = ctx.use.layer.parameter(local).numel()
            rows = grad.reshape(units.rows, -1, size)
            # One copy per row, or, where a model merges rows and tokens, one per token.
            rows = rows[:, 0] if rows.shape[1] == 1 else rows.sum(1)
            return RowsRecord(local, units.blank(rows, 1), units.cu_rows)

        ctx.use.record(make)
        return None, None, None, None


def per_row(module: nn.Module, local: str, shape: torch.Size, first: Any = None) -> Any:
    """Expand a trained parameter of a module to an activation.

    Args:
        module: The module.
        local: The parameter's name in it.
        shape: Of the activation, up to and with the parameter's own dimensions.
        first: The use that was opened already, for the first parameter of a forward.
    """
    use = open_use(module) if first is None else first
    return _PerRow.apply(module._parameters[local], shape, local, use)


class _Affine:
    """Normalise without parameters, then scale and shift with copies per row."""

    def _normalise(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _trailing(self: Any, x: torch.Tensor) -> int:
        """Dimensions of the activation behind the parameter's own."""
        return 0

    def _run(self: Any, x: torch.Tensor, plain: Any) -> torch.Tensor:
        first = open_use(self)
        if first is None:
            return plain(x)
        out, trailing = self._normalise(x), self._trailing(x)
        for local in ("weight", "bias"):
            param = self._parameters.get(local)
            if param is None:
                continue
            copy = param
            if param.requires_grad:
                copy = per_row(self, local, x.shape[: x.ndim - trailing], first)
                first = None
            copy = copy.reshape(*copy.shape, *(1,) * trailing)
            out = out * copy if local == "weight" else out + copy
        return out


class PrivateLayerNorm(_Affine, nn.LayerNorm):
    """See `_Affine`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.LayerNorm`."""
        return self._run(input, super().forward)

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.normalized_shape, None, None, self.eps)


class PrivateRMSNorm(_Affine, nn.RMSNorm):
    """See `_Affine`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `nn.RMSNorm`."""
        return self._run(x, super().forward)

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.normalized_shape, None, self.eps)


class PrivateGroupNorm(_Affine, nn.GroupNorm):
    """See `_Affine`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.GroupNorm`."""
        return self._run(input, super().forward)

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        return functional.group_norm(x, self.num_groups, None, None, self.eps)

    def _trailing(self, x: torch.Tensor) -> int:
        return x.ndim - 2


class PrivateBroadcast:
    """A module that multiplies and adds its one-dimensional parameters along the last dimension."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on copies."""
        first = open_use(self)
        if first is None:
            return super().forward(x, *args, **kwargs)
        own = self._parameters
        copies = {}
        for local in sorted(trainable(self)):
            copies[local] = per_row(self, local, x.shape, first)
            first = None
        # What `torch.func.functional_call` does, one class further in.
        object.__setattr__(self, "_parameters", {**own, **copies})
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            object.__setattr__(self, "_parameters", own)


@functools.cache
def user_mixin(forward: Any) -> type:
    """Make the mixin of a registered rule."""

    class PrivateRegistered:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            first = open_use(self)
            if first is None:
                return super().forward(*args, **kwargs)
            copies = {}
            for local, param in self._parameters.items():
                if param is not None and param.requires_grad:
                    use: Any = open_use(self) if first is None else first
                    copies[local] = _PerRow.apply(
                        param, torch.Size([use.units.rows, *param.shape]), local, use
                    )
                    first = None
            return forward(self, copies, *args, **kwargs)

    return PrivateRegistered


def _vmapped(module: Any, copies: dict[str, torch.Tensor], *args: Any) -> Any:
    """Run a module row by row, each with its own copies."""

    def one(mine: dict[str, torch.Tensor], *row: torch.Tensor) -> Any:
        call = type(module)._dp_original.forward
        own = module._parameters
        object.__setattr__(module, "_parameters", {**own, **mine})
        try:
            return call(module, *(r.unsqueeze(0) for r in row)).squeeze(0)
        finally:
            object.__setattr__(module, "_parameters", own)

    return torch.func.vmap(one, randomness="different")(copies, *args)


FALLBACK = Rule(
    "vmap fallback",
    lambda module: True,
    user_mixin(_vmapped),
    lambda module, generator: torch.empty(0),
    lambda module: (
        "its submodules have parameters of their own" if any(module.children()) else None
    ),
)
"""Covers what no rule does, at the cost of one gradient per row; only if asked for."""


def _hidden(module: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 3, *module.weight.shape, generator=generator)


def _channels(module: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, module.num_channels, 3, generator=generator)


def _is_broadcast(module: nn.Module) -> bool:
    """Whether it looks like a model's own norm layer; the probe decides."""
    own = {n for n, p in module._parameters.items() if p is not None}
    return (
        type(module).__name__.removeprefix("Private").endswith(("RMSNorm", "LayerNorm"))
        and own <= {"weight", "bias"}
        and all(p is None or p.ndim == 1 for p in module._parameters.values())
        and not any(module.children())
    )


def _add(name: str, matches: Any, mixin: type, probe: Any = _hidden) -> None:
    register(Rule(name, matches, mixin, probe, copies=True))


_add("broadcast norm", _is_broadcast, PrivateBroadcast)
_add("norm", lambda m: isinstance(m, nn.LayerNorm), PrivateLayerNorm)
_add("norm", lambda m: isinstance(m, nn.RMSNorm), PrivateRMSNorm)
_add("norm", lambda m: isinstance(m, nn.GroupNorm), PrivateGroupNorm, _channels)
