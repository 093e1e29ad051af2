"""Calibration data as batches of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor

from slimmoe.calibration.statistics import hexadecimal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_KEYS = {"input_ids", "attention_mask", "mask", "labels"}


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that are run together.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 0 for padding; None if there is none.
        counted: ``[B, T]`` bool, the tokens that count; None if all do.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    counted: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return self.input_ids.numel() if self.counted is None else int(self.counted.sum())

    def ahead(self, depth: int) -> Tensor:
        """Which rows count of a module that looks so many tokens ahead, bool ``[B, T - depth]``.

        Those whose own token counts, and the one ahead.
        """
        if self.counted is None:
            batch, size = self.input_ids.shape
            return torch.ones(batch, size - depth, dtype=torch.bool)
        return self.counted[:, depth:] & self.counted[:, :-depth]

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments for a model.

        Positions count a sequence's own tokens, so that padding on the left changes nothing.
        """
        inputs = {"input_ids": self.input_ids.to(device)}
        if self.attention_mask is not None:
            mask = self.attention_mask.to(device)
            positions = (mask.cumsum(-1) - 1).clamp_(min=0)
            inputs |= {"attention_mask": mask, "position_ids": positions}
        return inputs


def make_batches(
    data: Iterable[Any] | Tensor,
    *,
    batch_tokens: int,
    sequence_length: int,
    tokenizer: Any = None,
    exclude: Iterable[int] = (),
) -> list[Batch]:
    """Make batches of texts, of token ids, or of batches.

    Texts are packed: tokenized one after the other, with the tokenizer's end-of-sequence token
    after each, and cut every ``sequence_length`` tokens, so that nothing is dropped or padded, and
    a token may attend to the text before its own. The last sequence may be shorter. Token ids are
    run as the sequences that they are, whatever their length, the longest first, and padded on the
    right where lengths differ. Batches are run as they are.

    Args:
        data: Texts; or sequences of token ids, as lists, 1-D tensors or one tensor ``[N, T]``; or
            batches with ``input_ids`` ``[B, T]`` and maybe ``attention_mask`` (0 for padding) and
            ``mask`` (0 for tokens that shall be run and not counted), both ``[B, T]``; ``labels``
            are ignored.
        batch_tokens: Tokens of a batch, padding included. One sequence is the least.
        sequence_length: Of packed texts.
        tokenizer: For texts.
        exclude: Ids of tokens that do not count; they are run.

    Raises:
        TypeError: Something else.
        ValueError: No data, no token that counts, or a sequence of padding only.
    """
    items = list(data) if not isinstance(data, str) else data
    if isinstance(items, str):
        raise TypeError(message("data", "a list of texts", data, "put the text in a list"))
    if not items:
        raise ValueError("data: the calibration data is empty; give at least one sequence")
    if isinstance(items[0], Mapping):
        batches = [_given(item, at) for at, item in enumerate(items)]
    else:
        sequences = make_sequences(items, sequence_length, tokenizer)
        batches = _padded(sequences, batch_tokens)
    excluded = torch.tensor(sorted(set(exclude)), dtype=torch.int64)
    if excluded.numel():
        batches = [_excluding(batch, excluded) for batch in batches]
    if not any(batch.tokens for batch in batches):
        raise ValueError("data: every token is padding or excluded; give tokens that count")
    return batches


def hash_tokens(batches: Sequence[Batch]) -> str:
    """Hash the token ids without padding, whatever the order and the batches.

    Returns:
        Sum modulo 2²⁵⁶ of the sequences' SHA-256, in hexadecimal.
    """
    return hash_sequences(
        ids if batch.attention_mask is None else ids[batch.attention_mask[row].cpu() != 0]
        for batch in batches
        for row, ids in enumerate(batch.input_ids.cpu())
    )


def hash_sequences(sequences: Iterable[Tensor]) -> str:
    """Hash sequences of token ids as `hash_tokens` does."""
    total = 0
    for ids in sequences:
        digest = hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).digest()
        total += int.from_bytes(digest, "big")
    return hexadecimal(total)


def make_sequences(items: list[Any], length: int, tokenizer: Any) -> list[Tensor]:
    """Return sequences of token ids, int64 ``[T]``: texts packed, token ids as they are.

    Args:
        items: Of `make_batches`, without batches.
        length: Of packed texts.
        tokenizer: For texts.
    """
    texts = isinstance(items[0], str)
    return _packed(items, length, tokenizer) if texts else _as_sequences(items)


def _packed(texts: list[Any], length: int, tokenizer: Any) -> list[Tensor]:
    if tokenizer is None:
        raise ValueError("data: texts need a tokenizer; pass tokenizer=... or give token ids")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("data: texts and something else are mixed; give texts only")
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text)["input_ids"]
        if end is not None and stream and stream[-1] != end:
            stream.append(end)
    return [torch.tensor(stream[at : at + length]) for at in range(0, len(stream), length)]


def _as_sequences(items: list[Any]) -> list[Tensor]:
    sequences = []
    for at, item in enumerate(items):
        sequence = torch.as_tensor(item)
        if not sequence.numel():
            raise ValueError(f"data[{at}] is an empty sequence; leave it out")
        if sequence.ndim != 1 or sequence.dtype.is_floating_point or sequence.dtype is torch.bool:
            raise TypeError(
                message(f"data[{at}]", "a sequence of token ids", item, "see calibrate's data")
            )
        sequences.append(sequence.to("cpu", torch.int64))
    return sequences


def _padded(sequences: list[Tensor], batch_tokens: int) -> list[Batch]:
    sequences = sorted(sequences, key=len, reverse=True)
    batches = []
    at = 0
    while at < len(sequences):
        longest = len(sequences[at])
        rows = sequences[at : at + max(1, batch_tokens // longest)]
        at += len(rows)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        real = torch.arange(longest) < lengths[:, None]
        batches.append(_batch(ids, None if real.all() else real, None))
    return batches


def _given(item: Any, at: int) -> Batch:
    unknown = set(item) - _KEYS
    if "input_ids" not in item or unknown:
        wrong = f"{min(unknown)!r}, which is not supported" if unknown else "no input_ids"
        raise ValueError(f"data[{at}] has {wrong}; a batch has input_ids and attention_mask")
    ids = torch.as_tensor(item["input_ids"]).to("cpu", torch.int64)
    if ids.ndim != 2:
        raise ValueError(message(f"data[{at}]['input_ids']", "[B, T]", ids, "give a batch"))
    masks = []
    for name in ("attention_mask", "mask"):
        mask = item.get(name)
        if mask is not None:
            mask = torch.as_tensor(mask).cpu() != 0
            if mask.shape != ids.shape:
                raise ValueError(
                    message(f"data[{at}][{name!r}]", f"shape {tuple(ids.shape)}", mask, "match it")
                )
        masks.append(None if mask is None or mask.all() else mask)
    real, counted = masks
    if not ids.numel() or (real is not None and not real.any(-1).all()):
        raise ValueError(f"data[{at}] is empty or has a sequence of padding only; leave it out")
    return _batch(ids, real, counted)


def _batch(ids: Tensor, real: Tensor | None, counted: Tensor | None) -> Batch:
    both = [mask for mask in (real, counted) if mask is not None]
    return Batch(
        ids,
        None if real is None else real.to(torch.int64),
        torch.stack(both).all(0) if both else None,
    )


def _excluding(batch: Batch, excluded: Tensor) -> Batch:
    keep = ~torch.isin(batch.input_ids, excluded)
    if batch.counted is not None:
        keep &= batch.counted
    return Batch(batch.input_ids, batch.attention_mask, None if keep.all() else keep)
