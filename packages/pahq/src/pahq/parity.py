"""Whether a model can be run, and is what its adapter takes it for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pahq.errors import UnsupportedModelError

if TYPE_CHECKING:
    from pahq.forward import Executor

#: Largest distance of logits from the model's, over their largest absolute value.
_PARITY = 1e-4


def check_model(model: Any) -> None:
    """Refuse a model whose weights are not there, or that is not the same in every run.

    Raises:
        UnsupportedModelError: Its dropout is on, or somebody else moves its weights.
    """
    if any(isinstance(m, nn.Dropout) and m.training and m.p for m in model.modules()):
        raise UnsupportedModelError(
            "model: its dropout is on, and no two runs would be the same; call model.eval()"
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UnsupportedModelError(
            "model: some of its weights are on the meta device, as device_map leaves them; load "
            "it whole on the CPU, and give offload='cpu'"
        )
    places = sorted({str(p.device) for p in model.parameters()})
    if len(places) > 1:
        raise UnsupportedModelError(
            f"model: expected all weights on one device, got {', '.join(places)}; load it whole "
            "on the CPU, and give offload='cpu'"
        )


@torch.no_grad()
def check_parity(model: Any, executor: Executor) -> None:
    """Refuse a model whose logits an executor does not reproduce.

    Raises:
        UnsupportedModelError: Their distance is too large.
    """
    adapter = executor.adapter
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draws = torch.Generator().manual_seed(0)
    size = min(12, getattr(model.config.get_text_config(), "max_position_embeddings", 12))
    ids = torch.randint(vocabulary, (2, size), generator=draws).to(adapter.device)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        wanted = model(input_ids=ids, use_cache=False).logits.to(adapter.dtype)
    finally:
        for module in training:
            module.training = True
    found = adapter.logits(executor.plain(ids).final)
    distance = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
    # a model of 16 bits rounds its own activations
    most = _PARITY if next(model.parameters()).element_size() >= 4 else 0.1
    if not distance <= most:
        raise UnsupportedModelError(
            f"model: logits of {type(model).__name__} are not reproduced, off by "
            f"{distance:.1e} of the largest; it has a part that its adapter does not know "
            "(adapters, quantised weights, another attention), merge or remove it"
        )
