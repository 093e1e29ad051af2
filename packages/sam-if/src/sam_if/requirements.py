"""What a model has to be for its steps, and the field that they follow, to have derivatives."""

from __future__ import annotations

import torch
from shared_kernels._checks import message
from torch import nn


def check_model(model: nn.Module, *, batch_norm: bool = False) -> None:
    """Refuse a model whose steps depend on chance, or whose samples depend on each other.

    Args:
        model: The model.
        batch_norm: Whether batch norm in training mode will do.

    Raises:
        ValueError: What it has, and what to do about it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            remedy = "have its probability 0, or call eval()"
            raise ValueError(message("model", "no dropout", f"{name}.p = {module.p}", remedy))
        couples = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if couples and not batch_norm:
            remedy = "its statistics couple the samples of a batch: eval(), or bn='frozen'"
            raise ValueError(message("model", "no batch norm in training", name, remedy))
    check_derivatives(model)


def check_derivatives(model: nn.Module) -> None:
    """Refuse a model without precise second derivatives.

    Raises:
        ValueError: What it has, and what to do about it.
    """
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if wrong := sorted(str(kind) for kind in kinds - {torch.float32, torch.float64}):
        remedy = "differences of gradients are noise in 16 bits: model.float()"
        raise ValueError(message("model", "float32 or float64", wrong, remedy))
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in (None, "eager"):
        remedy = "fused attention has no derivatives in forward mode: load the model so"
        raise ValueError(message("model", "attn_implementation='eager'", attention, remedy))
    on_gpu = any(p.is_cuda for p in model.parameters())
    if on_gpu and torch.float32 in kinds and torch.get_float32_matmul_precision() != "highest":
        remedy = "TF32 has 10 bits: torch.set_float32_matmul_precision('highest')"
        got = torch.get_float32_matmul_precision()
        raise ValueError(message("model", "products in float32", got, remedy))
