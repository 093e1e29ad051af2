"""A prompt with a place for the tokens that are searched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from shared_kernels._checks import message

from pskv.search.config import SLOT
from pskv.tokenization import read_again

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SearchPrompt:
    """Token ids around the place; each int64.

    Attributes:
        before: In front of it, the shared prefix.
        after: Behind it, up to where the answer begins.
        target: What the answer should be.
        texts: Before and after as text.
    """

    before: np.ndarray
    after: np.ndarray
    target: np.ndarray
    texts: tuple[str, str]

    @classmethod
    def render(
        cls, tokenizer: PreTrainedTokenizerBase, messages: str | list[dict[str, str]], target: str
    ) -> SearchPrompt:
        """Render a chat, or take a text as it is if the tokenizer has no chat template.

        Args:
            tokenizer: Of the model.
            messages: A user's message, or a chat; ``{optim_str}`` marks the place, the end of the
                last message by default.
            target: What the model should say.

        Raises:
            ValueError: No target, more than one place, or a template that loses it.
        """
        if not target:
            raise ValueError(message("target", "some text", target, "say what to search for"))
        chat = (
            [{"role": "user", "content": messages}]
            if isinstance(messages, str)
            else [dict(turn) for turn in messages]
        )
        if not chat:
            raise ValueError(message("messages", "at least one message", messages, "pass one"))
        if not any(SLOT in turn["content"] for turn in chat):
            chat[-1]["content"] += SLOT
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text = "".join(turn["content"] for turn in chat)
        parts = str(text).split(SLOT)
        if len(parts) != 2:
            raise ValueError(
                f"messages: expected {SLOT} once in the rendered prompt, got it "
                f"{len(parts) - 1} times; put it into one message as it stands"
            )
        # a template writes special tokens out; a plain text gets those of the tokenizer
        special = not tokenizer.chat_template
        before = tokenizer(parts[0], add_special_tokens=special)["input_ids"]
        after, wanted = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (parts[1], target)
        )
        ids = [np.array(part, dtype=np.int64) for part in (before, after, wanted)]
        return cls(ids[0], ids[1], ids[2], (parts[0], parts[1]))

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str, *, joined: bool) -> np.ndarray:
        """Encode a text for the place.

        Args:
            tokenizer: Of the model.
            text: To stand in the place.
            joined: Ask for tokens that survive when the whole prompt is written and read again;
                a space is put in front where that helps.

        Raises:
            ValueError: There are none.
        """
        for candidate in (text, " " + text) if joined else (text,):
            ids = tokenizer(candidate, add_special_tokens=False)["input_ids"]
            whole = [*self.before.tolist(), *ids, *self.after.tolist()]
            if ids and (not joined or read_again(tokenizer, [whole]) == [whole]):
                return np.array(ids, dtype=np.int64)
        raise ValueError(
            f"init: expected a text whose tokens stay the same inside the prompt, got {text!r}; "
            "choose another, or set filter=False"
        )
