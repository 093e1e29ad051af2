"""Which rows of a batch belong to which privacy unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flashdp.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["Units", "packed_starts", "units_of_call"]


@dataclass(frozen=True)
class Units:
    """The units of one physical batch.

    A *row* is what a unit is made of: an index of the first dimension of every activation, or of
    the first two for sequences packed into one. Rows of a unit follow each other.

    Attributes:
        cu_rows: int32 (units + 1,), rows before each unit; the first is 0, the last all rows.
        rows: Number of rows, ``cu_rows[-1]`` known on the host.
        mask: bool (units,), False for padding, which contributes nothing; None if all are real.
        row_dims: 1, or 2 for packed activations (1, tokens, ...).
        single: Whether every unit is exactly one row.
        longest: Rows of the largest unit, known on the host.
        scale: What gradients are multiplied by to be those of a sum over units.
    """

    cu_rows: Tensor
    rows: int
    mask: Tensor | None = None
    row_dims: int = 1
    single: bool = True
    longest: int = 1
    scale: float = 1.0
    _cu_tokens: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def one_per_row(
        cls, rows: int, device: torch.device, mask: Tensor | None = None, *, scale: float = 1.0
    ) -> Units:
        """Every row is a unit."""
        cu_rows = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return cls(cu_rows, rows, None if mask is None else mask.to(device), scale=scale)

    @classmethod
    def grouped(
        cls,
        cu_rows: Tensor,
        device: torch.device,
        mask: Tensor | None = None,
        *,
        row_dims: int = 1,
        scale: float = 1.0,
    ) -> Units:
        """Units of several rows.

        Args:
            cu_rows: Integers (units + 1,), on the host.
            device: Where activations are.
            mask: bool (units,), or None.
            row_dims: See the class.
            scale: See the class.

        Raises:
            ValueError: ``cu_rows`` does not rise from 0.
        """
        steps = cu_rows[1:] - cu_rows[:-1]
        if cu_rows.ndim != 1 or not len(cu_rows) or int(cu_rows[0]) or bool((steps < 0).any()):
            raise ValueError(
                "expected cumulative row counts that start at 0 and never fall, got "
                f"{cu_rows.tolist()[:6]}"
            )
        longest = int(steps.max()) if len(steps) else 0
        return cls(
            cu_rows.to(device=device, dtype=torch.int32),
            int(cu_rows[-1]),
            None if mask is None else mask.to(device),
            row_dims,
            bool((steps == 1).all()),
            longest,
            scale,
        )

    def __len__(self) -> int:
        """Number of units, padding included."""
        return len(self.cu_rows) - 1

    def flatten(
        self, x: Tensor, features: int, what: str, *, flattened: bool = False
    ) -> tuple[Tensor, Tensor, int]:
        """View an activation as token rows.

        Args:
            x: (rows, ..., *features) with ``features`` trailing dimensions.
            features: Trailing dimensions that are not tokens.
            what: The layer's name, for messages.
            flattened: Whether the model is known to merge (rows, tokens) before this layer, in
                order. It cannot be told from the shape: tokens routed to an expert look the same.

        Returns:
            The activation (tokens, *features), int32 (units + 1,) tokens before each unit, and
            tokens per row.

        Raises:
            PrivacyError: The leading dimension is not that of the batch, so that a token cannot be
                given to a unit.
        """
        lead = x.shape[: x.ndim - features]
        rows, per_row = self._rows(lead, what, flattened)
        flat = x.reshape(rows * per_row, *x.shape[x.ndim - features :])
        return flat, self._tokens_before(per_row), per_row

    def _tokens_before(self, per_row: int) -> Tensor:
        """``cu_rows`` in tokens, made once for all layers."""
        if per_row == 1:
            return self.cu_rows
        if per_row not in self._cu_tokens:
            self._cu_tokens[per_row] = self.cu_rows * per_row
        return self._cu_tokens[per_row]

    def _rows(self, lead: torch.Size, what: str, flattened: bool) -> tuple[int, int]:
        if len(lead) >= self.row_dims and lead[: self.row_dims].numel() == self.rows:
            return self.rows, lead[self.row_dims :].numel()
        if flattened and len(lead) == 1 and self.rows and lead[0] % self.rows == 0:
            return self.rows, lead[0] // self.rows
        raise PrivacyError(
            f"layer {what!r} sees activations of leading shape {tuple(lead)} in a batch of "
            f"{self.rows} rows: which row belongs to which privacy unit cannot be told; keep the "
            "batch as the first dimension, or freeze the layer"
        )

    def blank(self, x: Tensor, per_row: int) -> Tensor:
        """Put zeros where padding is, NaN there included, and undo a mean over rows.

        Args:
            x: (tokens, features).
            per_row: Tokens of a row.
        """
        if self.scale != 1:
            x = x * self.scale
        if self.mask is None:
            return x
        counts = (self.cu_rows[1:] - self.cu_rows[:-1]) * per_row
        real = torch.repeat_interleave(self.mask, counts, output_size=len(x))
        return torch.where(real[:, None], x, 0)

    def expand(self, parameter: Tensor, shape: torch.Size, *, flattened: bool = False) -> Tensor:
        """Repeat a parameter once per row, so that its gradient comes out per row.

        Args:
            parameter: (*own).
            shape: Of the activation it will be broadcast against, without what stands behind the
                parameter's own dimensions.
            flattened: See :meth:`flatten`.

        Returns:
            (rows, 1, ..., 1, *own) for ordinary batches, (1, rows, ..., *own) for packed ones, with
            as many dimensions as ``shape``; (rows * tokens, *own) for flattened activations.
        """
        lead = (1,) * (self.row_dims - 1) + (self.rows,)
        inner = len(shape) - parameter.ndim
        if flattened and inner == 1 and shape[0] != self.rows:
            per_row = shape[0] // self.rows
            spread = parameter.expand(self.rows, per_row, *parameter.shape)
            return spread.reshape(self.rows * per_row, *parameter.shape)
        ones = (1,) * (inner - len(lead))
        return parameter.expand(*lead, *ones, *parameter.shape)


def units_of_call(
    args: tuple, kwargs: Mapping[str, Any], given: Mapping[str, Any], *, mean: bool
) -> Units:
    """Return the units of a batch, from what a model is called with.

    Sequences packed into one row come with ``cu_seq_lens_q``, as transformers'
    ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` makes it; each is then what a row
    is elsewhere.

    Args:
        args: Positional arguments; the first tensor among them, or else among ``kwargs``, has the
            rows of the batch first.
        kwargs: Keyword arguments.
        given: ``dp_mask`` and ``dp_rows``, where they are known.
        mean: Whether the loss is a mean over rows, to be undone.

    Raises:
        PrivacyError: There is no tensor, or ``dp_rows`` or the packing is of another batch.
    """
    named = [value for name, value in kwargs.items() if not name.startswith("cu_seq_lens")]
    tensors = [v for v in (*args, *named) if isinstance(v, torch.Tensor) and v.ndim]
    if not tensors:
        raise PrivacyError(
            "the model was called without a tensor, so the rows of the batch cannot be counted"
        )
    rows, device = len(tensors[0]), tensors[0].device
    mask, cu_rows = given.get("dp_mask"), given.get("dp_rows")
    if (starts := packed_starts(kwargs)) is not None:
        return _packed(tensors[0], starts.cpu(), mask, cu_rows, mean=mean)
    scale = float(rows) if mean else 1.0
    if cu_rows is None:
        return Units.one_per_row(rows, device, mask, scale=scale)
    units = Units.grouped(cu_rows.cpu(), device, mask, scale=scale)
    if units.rows != rows:
        raise PrivacyError(
            f"the batch has {rows} rows, its units {units.rows}: they belong to different batches"
        )
    return units


def packed_starts(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Where each sequence of a packed batch starts, and the last ends; None if none is packed."""
    return kwargs.get("cu_seq_lens_q")


def _packed(
    x: Tensor, starts: Tensor, mask: Tensor | None, cu_rows: Tensor | None, *, mean: bool
) -> Units:
    if mean:
        raise PrivacyError(
            "loss_reduction='mean' means the mean over rows, and packed sequences are one row: "
            "make the loss a sum over sequences (flashdp.per_sample_loss(..., cu_seqlens=...))"
        )
    if len(x) != 1 or x.ndim < 2 or x.shape[1] != int(starts[-1]):
        raise PrivacyError(
            f"cu_seq_lens_q ends at {int(starts[-1])}: expected one row of as many tokens, got "
            f"shape {tuple(x.shape)}"
        )
    if cu_rows is not None:
        if int(cu_rows[-1]) != len(starts) - 1:
            raise PrivacyError(
                f"the batch has {len(starts) - 1} packed sequences, its units {int(cu_rows[-1])}: "
                "they belong to different batches"
            )
        starts = starts[cu_rows.cpu().long()]
    return Units.grouped(starts, x.device, mask, row_dims=2)
