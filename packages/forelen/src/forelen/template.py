"""Which tokens of a prompt are its user's, and which its chat template's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Messages that share neither their first nor their last letters.
_SENTINELS = ("Zebra quartz 17", "mellow Viaduct?", "31 over, and done.")


@dataclass(frozen=True)
class ChatSpan:
    """The constant tokens before and after what a user writes.

    The states of the tokens before are the same in every prompt, and uncertainty about them is
    high: they would hold much of the weight of a pool without telling anything.

    Attributes:
        before: Tokens that every prompt begins with.
        after: Tokens that every prompt ends with.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatSpan:
        """Find them by templating messages that have nothing in common.

        Returns:
            An empty span for a tokenizer without a chat template.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            return cls()
        rows = [
            list(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_dict=True,
                )["input_ids"]
            )
            for text in _SENTINELS
        ]
        before = _common(rows)
        after = _common([row[len(before) :][::-1] for row in rows])[::-1]
        return cls(tuple(before), tuple(after))

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return bool ``(B, T)``: the tokens of each prompt between those of the template.

        A prompt that does not begin and end as the template says counts whole; a warning says so.
        """
        attention = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        if not self.before and not self.after:
            return attention
        # tokens before and after each one in its prompt, whichever side is padded
        place = attention.long().cumsum(-1) - 1
        length = attention.sum(-1, keepdim=True)
        plain = (length[:, 0] > len(self.before) + len(self.after)).clone()
        for shift, token in enumerate(self.before):
            plain &= ((place == shift) & attention & (input_ids == token)).any(-1)
        for shift, token in enumerate(self.after):
            there = place == length - len(self.after) + shift
            plain &= (there & attention & (input_ids == token)).any(-1)
        inside = (place >= len(self.before)) & (place < length - len(self.after))
        if not bool(plain.all()):
            warnings.warn(
                f"{int((~plain).sum())} of {len(plain)} prompts are not framed by the chat "
                "template that the predictor knows; all of their tokens count",
                UserWarning,
                stacklevel=2,
            )
        return attention & torch.where(plain[:, None], inside, True)


def _common(rows: list[list[int]]) -> list[int]:
    """Return the tokens that all rows begin with."""
    found = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        found.append(tokens[0])
    return found
