"""Compression of a model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slimmoe.rewrite import Rewriter
from slimmoe.weights import Source

if TYPE_CHECKING:
    from slimmoe.planning import CompressionPlan


@torch.no_grad()
def compress_model(model: Any, plan: CompressionPlan) -> Any:
    """Return a compressed copy of a model, of the same class, on the same device.

    Args:
        model: Of transformers, whole in memory. It stays as it is.
        plan: Of `slimmoe.plan`, for this model.

    Raises:
        ValueError: The plan is of another model.
    """
    source = Source(model)
    config = source.config_class.from_dict(plan.config)
    state = {
        # from_pretrained keeps tensors that it is given
        out.name: out.make().clone()
        for out in Rewriter(source, plan).outputs()
    }
    made = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        experts_implementation=model.config._experts_implementation,
    )  # fmt: skip
    return made.to(model.device).train(model.training)
