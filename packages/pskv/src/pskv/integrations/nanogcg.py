"""Run an installed, unmodified nanogcg on shared prefixes.

```python
with pskv.integrations.nanogcg.accelerate():
    result = nanogcg.run(model, tokenizer, messages, target, config)
```
"""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pskv.prefix import SharedPrefix
    from pskv.scorer import PrefixScorer

_LOSSES = ("compute_candidates_loss", "_compute_candidates_loss_original")


class _Held:
    """Stands where nanogcg keeps its own cache: the prefix is held by the scorer."""


class _Runs:
    """A scorer for each model, and a prefix for each run."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.scorers: dict[int, PrefixScorer] = {}
        self.prefixes: weakref.WeakKeyDictionary[Any, tuple[Tensor, SharedPrefix]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, run: Any) -> tuple[PrefixScorer, SharedPrefix]:
        from pskv.scorer import PrefixScorer

        scorer = self.scorers.get(id(run.model))
        if scorer is None:
            scorer = self.scorers[id(run.model)] = PrefixScorer(run.model, **self.options)
        before = run.before_embeds
        known = self.prefixes.get(run)
        if known is None or known[0] is not before:
            if known is not None:
                known[1].close()
            known = self.prefixes[run] = (before, scorer.prefill(before[0].detach()))
        if run.prefix_cache and not isinstance(run.prefix_cache, _Held):
            run.prefix_cache = _Held()
        return scorer, known[1]


@contextmanager
def accelerate(*, backend: str = "auto", micro_batch: int | str = "auto") -> Generator[None]:
    """Let ``nanogcg.run`` score candidates and take gradients on one shared prefix.

    Replaced while the context is open, and put back however it ends: the loss of candidates, the
    gradient, the filter of token ids (one batched call with the same outcome), and the search for a
    batch size (memory is fitted by the scorer). Random numbers are drawn as before, so a seed gives
    the same strings, as far as rounding allows; mellowmax, early stopping and buffers work as
    before. ``use_prefix_cache`` makes no difference; on transformers 5 nanogcg's own raises.

    One difference is meant: embeddings that a model scales (Gemma's) are scaled in the gradient
    too, as they are in the loss.

    Works with nanogcg 0.2.3 and 0.3.0. With 0.3.0, whose requirements hold transformers back, the
    draft model of probe sampling runs as it did.

    Args:
        backend: As `PrefixScorer`.
        micro_batch: As `PrefixScorer`.

    Raises:
        ImportError: nanogcg is not installed.
        RuntimeError: This version of nanogcg has none of the functions that are replaced.
    """
    try:
        from nanogcg import gcg as module
    except ImportError as error:
        raise ImportError("nanogcg is not installed: pip install 'pskv[nanogcg]'") from error
    runs = _Runs({"backend": backend, "micro_batch": micro_batch})
    losses = [name for name in _LOSSES if hasattr(module.GCG, name)]
    if not losses or not hasattr(module.GCG, "compute_token_gradient"):
        raise RuntimeError(
            "nanogcg: this version has no loss or gradient that is known here; 0.2.3 and 0.3.0 are"
        )
    with ExitStack() as stack:
        for owner, name, new in (
            (module.GCG, losses[0], _candidates_loss(runs)),
            (module.GCG, "compute_token_gradient", _token_gradient(runs)),
            (module, "filter_ids", _filter_ids),
            (module, "find_executable_batch_size", _as_it_is),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        try:
            yield
        finally:
            for _, prefix in runs.prefixes.values():
                prefix.close()


def _candidates_loss(runs: _Runs) -> Callable[[Any, int, Tensor], Tensor]:
    def compute_candidates_loss(self: Any, search_batch_size: int, input_embeds: Tensor) -> Tensor:
        cached = bool(self.prefix_cache)
        scorer, prefix = runs.of(self)
        rows = input_embeds if cached else input_embeds[:, self.before_embeds.shape[1] :]
        output = scorer.score_embeds(prefix, rows.detach(), self.target_ids[0])
        logprobs, lse = torch.stack(output.token_logprobs), torch.stack(output.token_lse)
        loss = -logprobs.mean(1)
        if self.config.use_mellowmax:
            alpha = self.config.mellowmax_alpha
            count = torch.tensor(float(logprobs.shape[1]))
            loss = (torch.logsumexp(-alpha * (logprobs + lse), 1) - count.log()) / alpha
        if self.config.early_stop and bool(output.is_greedy.any()):
            self.stop_flag = True
        return loss.to(input_embeds.device)

    return compute_candidates_loss


def _token_gradient(runs: _Runs) -> Callable[[Any, Tensor], Tensor]:
    def compute_token_gradient(self: Any, optim_ids: Tensor) -> Tensor:
        scorer, prefix = runs.of(self)

        def objective(logits: Tensor, targets: Tensor) -> Tensor:
            if not self.config.use_mellowmax:
                return cross_entropy(logits, targets)
            alpha = self.config.mellowmax_alpha
            chosen = logits.gather(1, targets[:, None])[:, 0]
            return torch.logsumexp(-alpha * chosen, 0) / alpha

        with torch.no_grad():
            suffix = self.embedding_layer(optim_ids)[0]
            rest = torch.cat([self.after_embeds[0], self.target_embeds[0]])
        return scorer.embedding_gradient(
            prefix, suffix, rest.detach(), self.target_ids[0], objective=objective
        )[None]

    return compute_token_gradient


def _filter_ids(ids: Tensor, tokenizer: Any) -> Tensor:
    """Keep candidates that stay the same when they alone are written and read again."""
    rows = ids.tolist()
    again = tokenizer(tokenizer.batch_decode(ids), add_special_tokens=False)["input_ids"]
    kept = [a == b for a, b in zip(again, rows, strict=True)]
    if not any(kept):
        raise RuntimeError(
            "No candidate stays the same when it is decoded and encoded; set filter_ids=False or "
            "choose another optim_str_init"
        )
    return ids[torch.tensor(kept, device=ids.device)]


def _as_it_is(function: Callable[..., Any], starting_batch_size: int) -> Callable[..., Any]:
    return functools.partial(function, starting_batch_size)
