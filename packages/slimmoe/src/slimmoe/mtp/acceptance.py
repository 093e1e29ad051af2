"""How many tokens that modules of MTP draft the model itself would have given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slimmoe.mtp.modeling_mtp import MTPHead


@dataclass(frozen=True)
class Acceptance:
    """How drafts fared.

    Attributes:
        rates: Of each number of drafts, the share of positions where so many were all right.
        mean_length: Mean number of tokens for each run of the model: the one that it gives itself,
            and the drafts up to the first that is wrong.
        positions: From which was drafted.
    """

    rates: tuple[float, ...]
    mean_length: float
    positions: int


@torch.no_grad()
def acceptance_rate(
    model: Any,
    head: MTPHead,
    prompts: Sequence[Tensor],
    *,
    depth: int = 4,
    new_tokens: int = 64,
    batch: int = 16,
) -> Acceptance:
    """Draft from every position of greedy answers, and compare.

    The model continues each prompt greedily. From every position of the answer the head drafts: the
    last module again and again where there are fewer than drafts are wanted, each draft from its
    own hidden state and its own token. A draft is right if it is the token of the answer
    (arXiv:2605.08738, table 4: greedy verification).

    Args:
        model: Of transformers.
        head: Its modules.
        prompts: Token ids ``(T,)`` each.
        depth: Drafts of a position.
        new_tokens: Of an answer at most.
        batch: Prompts of one length that are answered at a time.

    Raises:
        ValueError: No prompts, or answers that are shorter than drafts.
    """
    check_range("depth", depth, 1, 1 << 10, "how many tokens are drafted")
    check_range("new_tokens", new_tokens, depth + 1, 1 << 20, "longer than drafts")
    check_range("batch", batch, 1, 1 << 20, "prompts at a time")
    right = torch.zeros(depth, dtype=torch.int64)
    positions = 0
    by_length: dict[int, list[Tensor]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    groups = [some[at : at + batch] for some in by_length.values()
              for at in range(0, len(some), batch)]  # fmt: skip
    for group in groups:
        ids = torch.stack(group).to(model.device)
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        )  # fmt: skip
        begin, end = ids.shape[1] - 1, answer.shape[1] - 1 - depth
        if end <= begin:
            continue
        drafted = drafts(model, head, answer, depth)[..., begin:end]
        wanted = torch.stack([answer[:, begin + 2 + d : end + 2 + d] for d in range(depth)], 1)
        # what is behind the end of an answer is padding
        last = _ends(answer, ids.shape[1], model.generation_config.eos_token_id)
        place = torch.arange(begin + 1 + depth, end + 1 + depth, device=ids.device)
        within = place <= last[:, None]
        found = (drafted == wanted).cummin(1).values & within[:, None]
        right += found.sum((0, 2)).cpu()
        positions += int(within.sum())
    if not positions:
        remedy = "give prompts whose answers are longer than drafts"
        raise ValueError(message("prompts", "answers to draft in", len(prompts), remedy))
    rates = (right.double() / positions).tolist()
    return Acceptance(tuple(rates), 1 + sum(rates), positions)


def _ends(answer: Tensor, begin: int, ends: Any) -> Tensor:
    """Return the place of each answer's last token ``(B,)``."""
    known = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    over = torch.zeros_like(answer[:, begin:], dtype=torch.bool)
    for end in known:
        over |= answer[:, begin:] == end
    first = over.int().argmax(1) + begin
    return torch.where(over.any(1), first, answer.shape[1] - 1)


@torch.no_grad()
def drafts(model: Any, head: MTPHead, input_ids: Tensor, depth: int) -> Tensor:
    """Return what is drafted behind each token but the last, ``(B, depth, T - 1)``.

    Draft d of row i is of token ``i + 1 + d``. It sees what the head gave for tokens up to
    ``i + 1``, as it has in its cache, and its own drafts.

    Args:
        model: Of transformers.
        head: Its modules.
        input_ids: ``(B, T)``, without padding.
        depth: Drafts of each.
    """
    count = len(head.modules_)
    hidden = model.get_decoder()(input_ids, use_cache=False).last_hidden_state[:, :-1]
    batch, size = hidden.shape[:2]
    embed, output = model.get_input_embeddings(), model.get_output_embeddings()
    rows = torch.arange(size, device=hidden.device)
    # of each module: embeddings, hidden states and places of all that it has seen
    seen: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in range(count)]
    token, found = input_ids[:, 1:], []
    for step in range(depth):
        number = min(step, count - 1)
        seen[number].append((embed(token), hidden, step))
        hidden = _given(head, number, seen[number], rows)
        token = output(hidden).argmax(-1)
        found.append(token)
    return torch.stack(found, 1).view(batch, depth, size)


def _given(
    head: MTPHead, number: int, seen: list[tuple[Tensor, Tensor, int]], rows: Tensor
) -> Tensor:
    """Return what a module gives for the last of what it has seen.

    Rows of a later draft see those of the first up to their own, and of others their own alone.
    """
    embeddings = torch.cat([part[0] for part in seen], 1)
    hidden = torch.cat([part[1] for part in seen], 1)
    size, first = len(rows), seen[0][2]
    position = torch.cat([rows + step for _, _, step in seen])[None]
    own = torch.eye(size, dtype=torch.bool, device=rows.device)
    nothing = torch.zeros_like(own)
    before = torch.ones_like(own).tril()
    mask = torch.cat([
        torch.cat([before if seen[column][2] == first else own if column <= row else nothing
                   for column in range(len(seen))], 1)
        for row in range(len(seen))
    ])  # fmt: skip
    bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=rows.device)
    bias = bias.masked_fill(~mask, torch.finfo(hidden.dtype).min)[None, None]
    context = head.context(embeddings, None, position.expand(len(hidden), -1))
    context["attention_mask"] = bias.expand(len(hidden), -1, -1, -1)
    return head.modules_[number](embeddings, hidden, **context)[:, -size:]
