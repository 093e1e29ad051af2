"""What a student is asked at the end: losses of test blocks, questions, and drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from slimmoe.mtp import acceptance_rate
from torch.nn.functional import cross_entropy

from findings.data import DOMAINS

if TYPE_CHECKING:
    from slimmoe.mtp import MTPHead
    from torch import Tensor

    from findings.data import Data

_ROWS = 64
#: Prompts that are continued, their length, and how far.
_PROMPTS, _LENGTH, _NEW = 256, 64, 48
DRAFTS = 4


@torch.no_grad()
def block_losses(model: Any, blocks: Tensor) -> Tensor:
    """Return the mean loss of each block, in nats per token ``(N,)``."""
    model.eval()
    found = []
    for some in blocks.split(_ROWS):
        ids = some.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found.append(losses.view(len(ids), -1).mean(1).cpu())
    return torch.cat(found)


@torch.no_grad()
def right_answers(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> Tensor:
    """Return which questions a model answers rightly, by the mean of an answer's tokens."""
    model.eval()
    rows, begins = [], []
    for question in questions:
        prompt = tokenizer(question["prompt"])["input_ids"][-96:]
        for answer in question["answers"]:
            said = tokenizer(answer)["input_ids"][:32]
            rows.append(prompt + said)
            begins.append(len(prompt))
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    place, ends = torch.arange(size - 1), torch.tensor([len(row) for row in rows])
    asked = (place >= torch.tensor(begins)[:, None] - 1) & (place < ends[:, None] - 1)
    scores = []
    for some, counted in zip(ids.split(_ROWS * 4), asked.split(_ROWS * 4), strict=True):
        given = some.to(model.device)
        logits = model(given, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), given[:, 1:], reduction="none").cpu()
        scores.append(-(losses * counted).sum(1) / counted.sum(1))
    return torch.cat(scores).view(len(questions), -1).argmax(1) == 0


def evaluate(model: Any, head: MTPHead | None, data: Data, tokenizer: Any) -> dict[str, Any]:
    """Return numbers of a model, and the losses of test blocks ``(N,)``."""
    losses = block_losses(model, data.test)
    found: dict[str, Any] = {"loss": losses.mean().item(), "losses": losses}
    for number, domain in enumerate(DOMAINS):
        if len(own := losses[data.domain == number]):
            found[f"loss_{domain}"] = own.mean().item()
    for kind, questions in data.questions.items():
        right = right_answers(model, tokenizer, questions)
        found[kind] = right.double().mean().item()
        found[f"{kind}_right"] = right
    if head is not None:
        prompts = data.test[: _PROMPTS * 9 : 9, :_LENGTH][:_PROMPTS]
        drafted = acceptance_rate(
            model, head.eval(), list(prompts), depth=DRAFTS, new_tokens=_NEW, batch=_PROMPTS
        )
        found |= {f"acc_{n}": rate for n, rate in enumerate(drafted.rates, 1)}
        found["accepted_length"] = drafted.mean_length
    return found
