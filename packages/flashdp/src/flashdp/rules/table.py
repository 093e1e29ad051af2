"""Tables: `nn.Embedding` and its subclasses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flashdp.errors import PrivacyError
from flashdp.records import TableRecord
from flashdp.rules.base import Rule, open_use, register


class _Table(torch.autograd.Function):
    """Look rows up; records tokens and the gradient of what was looked up."""

    @staticmethod
    def forward(ctx: Any, tokens, weight, padding_idx, use):
        ctx.save_for_backward(tokens)
        ctx.padding_idx, ctx.use = padding_idx, use
        return functional.embedding(tokens, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        (tokens,) = ctx.saved_tensors

        def make(units):
            flat, cu, per_row = units.flatten(grad, 1, ctx.use.layer.name)
            ids = tokens.reshape(-1)
            flat = units.blank(flat, per_row)
            if ctx.padding_idx is not None:
                flat = flat.masked_fill((ids == ctx.padding_idx)[:, None], 0)
            return TableRecord(ids, flat, cu, per_row)

        ctx.use.record(make)
        return None, None, None, None


class PrivateEmbedding(nn.Embedding):
    """Records where `nn.Embedding` would let autograd accumulate."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Embedding`; positions given once for all rows are looked up once per row."""
        use = open_use(self)
        if use is None:
            return super().forward(input)
        units = use.units
        if units.row_dims == 1 and units.rows != 1 and input.ndim > 1 and input.shape[0] == 1:
            input = input.expand(units.rows, *input.shape[1:])
        elif units.row_dims == 1 and input.ndim == 1 and input.shape[0] != units.rows:
            input = input.expand(units.rows, -1)
        elif input.ndim == 1 and units.rows > 1 and bool((input.diff() == 1).all()):
            # Taken for one id per row, positions would carry every unit's gradient under each.
            raise PrivacyError(
                f"layer {use.layer.name!r} looks up consecutive ids, as many as the batch has "
                "rows: give positions as (1, tokens), or ids of rows as (rows, 1)"
            )
        return _Table.apply(input, self.weight, self.padding_idx, use)


def _trouble(module: Any) -> str | None:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"{option}={getattr(module, option)!r} mixes rows of the batch"
    return None


def _tokens(module: Any, generator: torch.Generator) -> torch.Tensor:
    # Subclasses may take something else than rows of the table, as OPT's positions take a mask.
    plain = module.num_embeddings // 2 if type(module) is nn.Embedding else 2
    return torch.randint(0, max(1, plain), (2, 3), generator=generator)


register(
    Rule(
        "table",
        lambda module: isinstance(module, nn.Embedding),
        PrivateEmbedding,
        _tokens,
        _trouble,
    )
)
