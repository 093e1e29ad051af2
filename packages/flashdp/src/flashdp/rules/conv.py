"""Convolutions in one to three dimensions, grouped and dilated ones too.

One row's kernel gradient is small, so it is formed for every row: with the rows as groups of one
convolution, a single backward call gives them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flashdp.records import RowsRecord
from flashdp.rules.base import Rule, open_use, register, trainable


class _Conv(torch.autograd.Function):
    """A convolution without padding modes; records kernel and bias gradients per row."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, stride, padding, dilation, groups, wanted, uses):
        y = torch.convolution(
            x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups
        )
        ctx.save_for_backward(x.to(y.dtype), weight)
        ctx.how = (stride, padding, dilation)
        ctx.groups, ctx.wanted, ctx.uses, ctx.dtype = groups, wanted, uses, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.how
        zeros = (0,) * len(stride)
        below = None
        if ctx.needs_input_grad[0]:
            below = torch.ops.aten.convolution_backward(
                grad, x, weight.to(grad.dtype), None, stride, padding, dilation, False, zeros,
                ctx.groups, [True, False, False],
            )[0].to(ctx.dtype)  # fmt: skip
        rows = len(x)
        found = {}
        if "weight" in ctx.wanted and rows:
            kernels = weight.to(grad.dtype).repeat(rows, *(1,) * (weight.ndim - 1))
            found["weight"] = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), x.reshape(1, -1, *x.shape[2:]), kernels,
                None, stride, padding, dilation, False, zeros, rows * ctx.groups,
                [False, True, False],
            )[1].view(rows, -1)  # fmt: skip
        elif "weight" in ctx.wanted:
            found["weight"] = weight.new_zeros(0, weight.numel())
        if "bias" in ctx.wanted:
            wide = torch.promote_types(grad.dtype, torch.float32)
            found["bias"] = grad.flatten(2).sum(2, dtype=wide)
        for local, use in ctx.uses.items():

            def make(units, local=local, name=use.layer.name):
                g, _, _ = units.flatten(found[local], 1, name)
                return RowsRecord(local, units.blank(g, 1), units.cu_rows)

            use.record(make)
        return below, *(None,) * 8


class _PrivateConv:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        first = open_use(self)
        if first is None:
            return super().forward(input)
        wanted = tuple(sorted(trainable(self)))
        uses = {wanted[0]: first, **{local: open_use(self) for local in wanted[1:]}}
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.stride)
        return _Conv.apply(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            wanted, uses,
        )  # fmt: skip


class PrivateConv1d(_PrivateConv, nn.Conv1d):
    """Records where `nn.Conv1d` would let autograd accumulate."""


class PrivateConv2d(_PrivateConv, nn.Conv2d):
    """Records where `nn.Conv2d` would let autograd accumulate."""


class PrivateConv3d(_PrivateConv, nn.Conv3d):
    """Records where `nn.Conv3d` would let autograd accumulate."""


def _image(module: Any, generator: torch.Generator) -> torch.Tensor:
    sizes = [
        d * (k - 1) + s + 2
        for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True)
    ]
    return torch.randn(2, module.in_channels, *sizes, generator=generator)


for _kind, _mixin in (
    (nn.Conv1d, PrivateConv1d),
    (nn.Conv2d, PrivateConv2d),
    (nn.Conv3d, PrivateConv3d),
):
    register(
        Rule("convolution", lambda module, kind=_kind: isinstance(module, kind), _mixin, _image)
    )
