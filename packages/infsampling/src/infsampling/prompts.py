"""Keys and values of prompts: of each by itself, or of many short ones together."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.prefix_attention import PrefixLayout

from infsampling.attention import PrefillCall

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from torch import Tensor

    from infsampling.cache import PrefixStore

#: Tokens and prompts that are computed together on a GPU, where so many take no longer than few.
_TOKENS, _PROMPTS = 1024, 32


@dataclass
class Prefilled:
    """What is known of a prompt once its keys and values are in their place.

    Attributes:
        logits: ``(1, V)``, of its last token.
        hidden: ``(d,)``, final hidden state of its last token.
        states: ``(P, d)``, final hidden states of all, if asked for.
    """

    logits: Tensor
    hidden: Tensor
    states: Tensor | None


def tokens_together(device: torch.device, chunk: int) -> int:
    """Return how many tokens of several prompts are computed together; 0 for none."""
    return min(_TOKENS, chunk) if device.type == "cuda" else 0


class Prefill:
    """Computes prompts into a store.

    What comes of a prompt does not depend on the others: short ones are padded to one number of
    tokens, so that the rows of a product have the same bits wherever they are.

    Args:
        model: A causal language model in evaluation mode, which attends by our function.
        store: Has a place for each prompt's keys and values.
        chunk: Tokens of one prompt that are computed at once.
        together: Tokens of several prompts.
    """

    def __init__(self, model: Any, store: PrefixStore, chunk: int, together: int) -> None:
        self.model, self.store, self.chunk, self.together = model, store, chunk, together
        self.device = next(model.parameters()).device

    def __call__(
        self, prompts: Iterable[tuple[Sequence[int], int]], *, states: bool = False
    ) -> Generator[Prefilled]:
        """Compute prompts, each with the place of its first token, and yield what comes of each."""
        waiting: list[tuple[Sequence[int], int]] = []
        tokens = 0
        for ids, start in prompts:
            if not len(ids):
                raise ValueError("prompt_ids: a prompt has no token")
            if len(waiting) == _PROMPTS or tokens + len(ids) > self.together:
                yield from self._many(waiting, states=states)
                waiting, tokens = [], 0
            if len(ids) > self.together:
                yield self._one(ids, start, states=states)
            else:
                waiting.append((ids, start))
                tokens += len(ids)
        yield from self._many(waiting, states=states)

    def _one(self, ids: Sequence[int], start: int, *, states: bool) -> Prefilled:
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)
        parts: list[Tensor] = []
        logits = hidden = tokens
        for low in range(0, len(ids), self.chunk):
            part = tokens[low : low + self.chunk]
            index = torch.arange(low, low + len(part), device=self.device)
            layout = PrefixLayout.build([len(part)], shared=(start, low))
            logits, hidden, found = self._call(part, index, start + index, layout, 1, states=states)
            parts += found
        return Prefilled(logits, hidden[0], torch.cat(parts) if states else None)

    def _many(
        self, prompts: list[tuple[Sequence[int], int]], *, states: bool
    ) -> Generator[Prefilled]:
        if not prompts:
            return
        lengths = torch.tensor([len(ids) for ids, _ in prompts])
        ends = lengths.cumsum(0)
        rest = self.together - int(ends[-1])
        tokens, index, place = torch.zeros(3, self.together, dtype=torch.int64)
        # what pads is written where no prompt is
        place += self.store.tokens - 1
        for (ids, start), end in zip(prompts, ends.tolist(), strict=True):
            here = slice(end - len(ids), end)
            tokens[here] = torch.as_tensor(ids)
            index[here] = torch.arange(len(ids))
            place[here] = start + index[here]
        keep = (ends - 1)[torch.arange(_PROMPTS).clamp(max=len(prompts) - 1)]
        layout = PrefixLayout.build([*lengths.tolist(), rest])
        logits, hidden, found = self._call(
            *(x.to(self.device) for x in (tokens, index, place)), layout, keep.to(self.device),
            states=states,
        )  # fmt: skip
        for row, end in enumerate(ends.tolist()):
            mine = found[0][end - int(lengths[row]) : end] if states else None
            yield Prefilled(logits[row : row + 1], hidden[row], mine)

    def _call(
        self, tokens: Tensor, index: Tensor, place: Tensor, layout: PrefixLayout,
        keep: int | Tensor, *, states: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """Return logits and final states of the tokens to keep, and the states of all if wanted."""
        self.store.write_to(place)
        kept: list[Tensor] = []
        whole: list[Tensor] = []
        with ExitStack() as stack:
            head = self.model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, args: kept.append(args[0][0].detach()))
            stack.callback(hook.remove)
            if states:
                hook = self.model.base_model.register_forward_hook(
                    lambda _, args, out: whole.append(out[0][0].detach())
                )
                stack.callback(hook.remove)
            logits = self.model(
                input_ids=tokens[None], position_ids=index[None], past_key_values=self.store,
                use_cache=True, logits_to_keep=keep, infsampling=PrefillCall(self.store, layout),
            ).logits[0]  # fmt: skip
        return logits, kept[0], whole
