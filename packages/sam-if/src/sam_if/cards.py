"""Samples of a run as `Card` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sam_if.objective import IGNORED
from sam_if.views import Card

if TYPE_CHECKING:
    from sam_if.run import RecordedRun

#: What is no content of a sample.
_ASIDE = ("labels", "attention_mask", "token_type_ids")


def card_of(batch: Any, place: int, tokenizer: Any = None) -> Card:
    """Return a sample of a batch: its text, its picture, or its numbers.

    Args:
        batch: A mapping of a model's inputs, or inputs and labels.
        place: Of the sample in it.
        tokenizer: Of texts; without one token ids are numbers.
    """
    given = batch if isinstance(batch, Mapping) else {"x": batch[0], "labels": batch[1]}
    labels = given.get("labels")
    single = isinstance(labels, Tensor) and labels.dim() == 1
    label = f"{labels[place].item():g}" if single else None
    if "input_ids" in given and tokenizer is not None:
        ids = given["input_ids"][place]
        if "attention_mask" in given:
            ids = ids[given["attention_mask"][place].bool()]
        return Card(tokenizer.decode(ids.tolist(), skip_special_tokens=True), label)
    parts = {name: value[place] for name, value in given.items() if name not in _ASIDE}
    if "pixel_values" in parts:
        picture = parts["pixel_values"].float()
        low, high = picture.min(), picture.max()
        return Card((picture - low) / (high - low).clamp(min=1e-12), label)
    if not single and isinstance(labels, Tensor):
        parts["labels"] = labels[place][labels[place] != IGNORED]
    # flat, so that no matrix of numbers is taken for a picture
    return Card({name: value.flatten() for name, value in parts.items()}, label)


class RunCards(Sequence):
    """The training samples of a run, read when they are looked at.

    Args:
        run: The record.
        tokenizer: As in `card_of`.
    """

    def __init__(self, run: RecordedRun, tokenizer: Any = None) -> None:
        self._run, self._tokenizer = run, tokenizer

    def __len__(self) -> int:
        return self._run.count

    def __getitem__(self, index: Any) -> Any:
        """Return a sample, as a `Card`.

        Raises:
            ValueError: It was never trained on.
        """
        return card_of(*self._run.sample(index), self._tokenizer)
