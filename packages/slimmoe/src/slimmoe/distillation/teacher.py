"""The model that is distilled from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.models import Head

from slimmoe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class Teacher:
    """A model whose last hidden states and head are all that is asked for.

    It is not trained, wrapped or checkpointed, and its logits are never there as a whole.

    Args:
        model: Of transformers.

    Raises:
        UnsupportedModelError: Its logits are more than a product with the head.
    """

    def __init__(self, model: Any) -> None:
        check_head(model, "teacher_model")
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Teacher:
        """Load one with ``AutoModelForCausalLM``, in the dtype of its files unless told otherwise.

        Args:
            path: Folder or name on the Hub.
            options: Of ``AutoModelForCausalLM.from_pretrained``.
        """
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path, **options))

    def to(self, device: torch.device) -> Teacher:
        """Move it to a device."""
        self.model.to(device)
        return self

    @property
    def weight(self) -> Tensor:
        """The head, ``(V, H)``."""
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return last hidden states, ``(B, T, H)``.

        Args:
            inputs: Token ids, and what else a model takes; labels are left out.
        """
        known = {key: value for key, value in inputs.items() if key != "labels"}
        return self.model.get_decoder()(**known, use_cache=False).last_hidden_state


def check_head(model: Any, name: str) -> None:
    """Refuse a model whose logits are more than a product of hidden states and head.

    Raises:
        UnsupportedModelError: They are scaled, capped, or have a bias.
    """
    head = Head.of(model)
    if (
        not head.is_plain()
        or head.module.bias is not None
        or head.scale != 1
        or head.softcap is not None
    ):
        raise UnsupportedModelError(
            f"{name}: expected logits that are hidden states times the head, got some that are "
            "scaled, capped or have a bias; this loss cannot make them"
        )
