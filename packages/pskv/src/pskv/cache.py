"""A prefix as an ordinary cache of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pskv.prefix import PrefixCache

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SharedPrefixCache"]


class SharedPrefixCache(PrefixCache):
    """Pass it as ``past_key_values``: rows of a batch of any size continue the prefix.

    It is read and never written, so it serves any number of calls. Each layer copies the prefix for
    the rows of the batch while it runs, as the paper does; `PrefixScorer` copies nothing.
    """

    @classmethod
    @torch.no_grad()
    def from_prefix(cls, model: Any, prefix_ids: Tensor) -> SharedPrefixCache:
        """Compute it.

        Args:
            model: A causal language model of transformers.
            prefix_ids: int64 ``(P,)`` or ``(1, P)``.

        Raises:
            ValueError: More than one row.
        """
        ids = prefix_ids.reshape(1, -1) if prefix_ids.dim() == 1 else prefix_ids
        if ids.shape[0] != 1:
            raise ValueError(f"prefix_ids: expected one row, got {tuple(prefix_ids.shape)}")
        cache = cls(model.config.get_text_config().num_hidden_layers)
        device = model.get_input_embeddings().weight.device
        model(input_ids=ids.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.held:
            layer.mode = "expand"
        return cache
