"""Which candidates survive being written down and read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["RoundTripFilter"]


class RoundTripFilter:
    """Tells which candidates keep their token ids when the whole prompt is decoded and encoded.

    A search over token ids finds sequences that no text is encoded to; a user can only type text.
    The whole prompt is compared, because tokens also merge across the candidate's borders.

    Args:
        tokenizer: Of the model.
        before: Token ids in front of a candidate.
        after: Token ids behind it.

    Raises:
        ValueError: The prompt does not survive even without a candidate, so none could.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], after: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.before, self.after = list(before), list(after)
        for name, part in (("before", self.before), ("after", self.after)):
            if part and read_again(tokenizer, [part]) != [part]:
                raise ValueError(
                    f"{name}: expected token ids that decoding and encoding returns, got "
                    f"{tokenizer.decode(part)!r}, which is encoded otherwise; encode the text anew"
                )

    def __call__(self, ids: Tensor) -> Tensor:
        """Return bool ``(N,)`` on the CPU for candidates int64 ``(N, s)``."""
        check_tensor("ids", ids, dtypes=(torch.int64,), shape=(None, None), strided=True)
        rows = [self.before + row + self.after for row in ids.tolist()]
        again = read_again(self.tokenizer, rows)
        return torch.tensor([a == b for a, b in zip(again, rows, strict=True)], dtype=torch.bool)


def read_again(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[list[int]]:
    """Decode rows of token ids, special tokens included, and encode the texts."""
    if not rows:
        return []
    texts = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return tokenizer(texts, add_special_tokens=False)["input_ids"]
