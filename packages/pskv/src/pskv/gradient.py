"""The gradient of an objective with respect to the embeddings behind a prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_choice
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from pskv.passes import Passes
    from pskv.prefix import SharedPrefix


def embedding_gradient(
    passes: Passes,
    prefix: SharedPrefix,
    suffix: Tensor,
    rest: Tensor,
    targets: Tensor,
    objective: str | Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the gradient ``(s, d)`` of an objective by the suffix's embeddings.

    The prefix's keys and values do not depend on what follows, so they are constants.

    Args:
        passes: The model.
        prefix: What stands before.
        suffix: Embeddings ``(s, d)`` to differentiate by.
        rest: Embeddings ``(r, d)`` behind them, those of the targets included.
        targets: int64 ``(t,)``, the last tokens.
        objective: ``nll`` or a function of logits ``(t, V)`` and targets.
    """
    held = prefix.cache.get_seq_length()
    # the last target predicts nothing that is asked for
    length = len(suffix) + len(rest) - 1
    with torch.enable_grad(), prefix.cache.mode("expand"):
        leaf = suffix.detach().clone().requires_grad_()
        place = torch.arange(held, held + length, device=leaf.device)
        hidden = passes.base(
            inputs_embeds=torch.cat([leaf, rest.detach()])[None, :length],
            position_ids=place[None], past_key_values=prefix.cache, use_cache=True,
        ).last_hidden_state[0]  # fmt: skip
        logits = passes.head.logits(hidden[length - len(targets) :])
        wanted = targets.to(logits.device)
        if isinstance(objective, str):
            check_choice("objective", objective, ("nll",))
            loss = cross_entropy(logits.float(), wanted, reduction="sum")
        else:
            loss = objective(logits, wanted)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def token_gradient(
    passes: Passes,
    prefix: SharedPrefix,
    row: np.ndarray,
    suffix: int,
    targets: int,
    objective: str | Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the gradient ``(s, V)`` by the choice of a row's first ``suffix`` tokens.

    Its last ``targets`` tokens are the targets.
    """
    ids = passes.tensor(row)
    with torch.no_grad():
        embeds = passes.inner.get_input_embeddings()(ids[None])[0]
    last = ids[len(ids) - targets :]
    gradient = embedding_gradient(passes, prefix, embeds[:suffix], embeds[suffix:], last, objective)
    return by_token(passes, gradient)


@torch.no_grad()
def by_token(passes: Passes, gradient: Tensor) -> Tensor:
    """Return ``<g_i, E(v)>`` ``(s, V)``: the gradient by the choice of each token.

    E is the model's embedding of a token, scaled as the model scales it.
    """
    count = passes.inner.get_input_embeddings().num_embeddings
    size = min(count, passes.head.module.weight.shape[0])
    vocabulary = torch.arange(size, device=gradient.device)
    return gradient @ passes.inner.get_input_embeddings()(vocabulary).mT
