"""Texts, chats and token ids as rows of token ids, checked before any work starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from shared_kernels._checks import message
from torch import Tensor

from pskv.errors import RetokenizationWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_row(ids: Any, name: str = "ids") -> np.ndarray:
    """Return token ids as int64 ``(n,)``.

    Raises:
        TypeError: Not one dimension of integers.
    """
    row = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise TypeError(message(name, "one dimension of token ids", ids, "encode it first"))
    return row.astype(np.int64)


class Encoder:
    """Encodes what a scorer is given.

    Args:
        tokenizer: For texts and chats.
        vocabulary: Number of tokens of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
        self._tokenizer, self.vocabulary = tokenizer, vocabulary

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: There is none.
        """
        if self._tokenizer is None:
            raise ValueError(
                "tokenizer: texts need one; pass it to PrefixScorer, or pass token ids"
            )
        return self._tokenizer

    def prefix(self, prefix: Any) -> np.ndarray:
        """Encode a text with special tokens, or a chat with the prompt of the answer."""
        if isinstance(prefix, str):
            return np.array(self.tokenizer(prefix)["input_ids"], dtype=np.int64)
        if isinstance(prefix, list) and prefix and isinstance(prefix[0], dict):
            ids = self.tokenizer.apply_chat_template(
                prefix, add_generation_prompt=True, return_dict=False
            )
            return np.array(ids, dtype=np.int64)
        ids = as_row(prefix, "prefix")
        self.check("prefix", ids)
        return ids

    def rows(
        self, continuations: Any, targets: Any, before: str | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the rows, targets included, and the place of each row's first target."""
        rows = self.texts("continuations", continuations, before)
        if targets is None:
            return rows, np.zeros(len(rows), dtype=np.int64)
        if isinstance(targets, str) or not any(isinstance(t, str) or np.ndim(t) for t in targets):
            ends = self.texts("targets", [targets], None) * len(rows)
        else:
            ends = self.texts("targets", targets, None)
        if len(ends) != len(rows):
            remedy = "give one for all, or one for each continuation"
            raise ValueError(message("targets", f"{len(rows)} targets", len(ends), remedy))
        first = np.array([len(row) for row in rows], dtype=np.int64)
        return [np.concatenate(pair) for pair in zip(rows, ends, strict=True)], first

    def texts(self, name: str, items: Any, before: str | None = None) -> list[np.ndarray]:
        """Encode texts without special tokens; token ids are taken as they are.

        Warns:
            RetokenizationWarning: A text is cut otherwise when it is joined to ``before``.
        """
        if isinstance(items, str):
            raise TypeError(message(name, "a sequence of texts", items, "put it into a list"))
        if isinstance(items, np.ndarray | Tensor) and items.ndim == 2:
            return list(as_row(items.reshape(-1), name).reshape(items.shape))
        if not any(isinstance(item, str) for item in items):
            return [as_row(item, f"{name}[{number}]") for number, item in enumerate(items)]
        encoded = self.tokenizer(list(items), add_special_tokens=False)["input_ids"]
        if before is not None:
            head = self.tokenizer(before)["input_ids"]
            joined = self.tokenizer([before + item for item in items])["input_ids"]
            for item, ids, whole in zip(items, encoded, joined, strict=True):
                if head + ids != whole:
                    warnings.warn(
                        f"{item!r} is cut into other tokens when it is joined to the prefix; the "
                        "tokens of the two texts alone are scored",
                        RetokenizationWarning,
                        stacklevel=5,
                    )
                    break
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    def check(self, name: str, ids: np.ndarray) -> None:
        """Refuse tokens outside the vocabulary.

        Raises:
            ValueError: Naming the worst.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
            expected = f"token ids in [0, {self.vocabulary})"
            raise ValueError(message(name, expected, worst, "use the model's tokenizer"))

    def check_rows(self, rows: list[np.ndarray], first: np.ndarray, prefix: int) -> None:
        """Refuse rows without a target, or whose first target nothing predicts.

        Raises:
            ValueError: Naming the row.
        """
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        for number in np.flatnonzero(counts <= first)[:1].tolist():
            remedy = "leave it out, or pass targets"
            raise ValueError(
                message(
                    f"continuations[{number}]", "at least one token to score", rows[number], remedy
                )
            )
        for number in np.flatnonzero(first == 0)[: 0 if prefix else 1].tolist():
            raise ValueError(
                message(
                    f"continuations[{number}]", "a token before the first to score",
                    rows[number].tolist()[:8], "begin with a token such as BOS, or pass targets",
                )
            )  # fmt: skip
        flat = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        outside = np.flatnonzero((flat < 0) | (flat >= self.vocabulary))
        if len(outside):
            number = int(np.searchsorted(np.cumsum(counts), outside[0], side="right"))
            self.check(f"continuations[{number}]", rows[number])
