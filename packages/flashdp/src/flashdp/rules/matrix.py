"""Matrices: `nn.Linear` and transformers' `Conv1D`, which keeps its weight transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flashdp.records import MatrixRecord
from flashdp.rules.base import Rule, open_use, register

# Decoder layers that merge (rows, tokens) in order before their feed-forward matrices.
FLATTENING = frozenset({"OPTDecoderLayer"})


class _Matrix(torch.autograd.Function):
    """y = x Wᵀ + b, or x W + b; records instead of computing the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, transposed, use):
        if transposed:
            y = x @ weight if bias is None else x @ weight + bias
        else:
            y = functional.linear(x, weight, bias)
        # Under autocast the product ran in y's dtype, and so does its gradient.
        ctx.save_for_backward(x.to(y.dtype), weight)
        ctx.transposed, ctx.use, ctx.dtype = transposed, use, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        below = None
        if ctx.needs_input_grad[0]:
            w = weight.to(grad.dtype)
            below = (grad @ w.t() if ctx.transposed else grad @ w).to(ctx.dtype)
        layer = ctx.use.layer

        def make(units):
            g, cu, per_row = units.flatten(grad, 1, layer.name, flattened=layer.flattened)
            a, _, _ = units.flatten(x.detach(), 1, layer.name, flattened=layer.flattened)
            g = units.blank(g, per_row)
            return MatrixRecord(a.to(g.dtype), g, cu, per_row, ctx.transposed)

        ctx.use.record(make)
        return below, None, None, None, None


class PrivateLinear(nn.Linear):
    """Records where `nn.Linear` would let autograd accumulate."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`."""
        use = open_use(self)
        if use is None:
            return super().forward(input)
        return _Matrix.apply(input, self.weight, self.bias, False, use)


class PrivateConv1D:
    """Records where transformers' `Conv1D` would let autograd accumulate."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As `Conv1D`."""
        use = open_use(self)
        if use is None:
            return super().forward(x)
        return _Matrix.apply(x, self.weight, self.bias, True, use)


def _is_conv1d(module: nn.Module) -> bool:
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def _inputs(weight: Any, dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 3, weight.shape[dim], generator=generator)


def _shape_trouble(module: Any) -> str | None:
    return None if module.weight.ndim == 2 else f"its weight has {module.weight.ndim} dimensions"


register(
    Rule(
        "matrix",
        lambda module: isinstance(module, nn.Linear),
        PrivateLinear,
        lambda module, generator: _inputs(module.weight, 1, generator),
        _shape_trouble,
    )
)
register(
    Rule(
        "matrix",
        _is_conv1d,
        PrivateConv1D,
        lambda module, generator: _inputs(module.weight, 0, generator),
        _shape_trouble,
    )
)
