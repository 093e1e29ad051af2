"""Public functions: sampling by Gumbel-max, and the refill of free slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.sampling import fields as f
from shared_kernels.ops.sampling import op, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gumbel_noise(keys: Tensor, index: Tensor, vocab: int) -> Tensor:
    """Draw the noise that `gumbel_sample` adds, by plain torch: for oracles and other samplers.

    Args:
        keys: int64 ``(S, 2)``, the two 32-bit words of each row's key.
        index: int64 ``(S,)``, number of the token in its row, below 2^32.
        vocab: V.

    Returns:
        float32 ``(S, V)``, standard Gumbel variables.

    Raises:
        TypeError: A dtype that is not int64.
        ValueError: Shapes or devices that do not fit together.
    """
    check_tensor("keys", keys, dtypes=(torch.int64,), shape=(None, 2), strided=True)
    shape = (keys.shape[0],)
    check_tensor("index", index, dtypes=(torch.int64,), shape=shape, device=keys.device)
    check_range("vocab", vocab, 0, 1 << 31, "pass the number of tokens")
    return reference.gumbel_noise(keys, index, vocab)


def gumbel_sample(
    logits: Tensor,
    keys: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    threshold: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a token of each row from ``softmax(logits / temperature)`` by Gumbel-max.

    The token is ``argmax_v z_v + gumbel_v`` with ``z = logits / temperature`` and noise that is a
    closed form of (key, index, v): it depends on no other row, on no order, and on no device; of
    equal scores the lowest token wins. Sums are float32 (float64 for float64, and inside numba).
    One pass over the logits; no tensor of the size ``(S, V)``.

    Args:
        logits: float ``(S, V)``; rows may be views of one (stride 0). -inf is never drawn.
        keys: int64 ``(S, 2)``, the two 32-bit words of each row's key.
        index: int64 ``(S,)``, number of the token in its row, below 2^32.
        temperature: 0 takes the largest logit, with ``z = logits``.
        threshold: float ``(S,)``; only tokens with ``z >= threshold`` are drawn. See
            `logit_threshold`.
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.

    Returns:
        Token int64 ``(S,)``, -1 where a logit is NaN or +inf or where no token is left; and float
        ``(S,)``: its log-probability ``z - logsumexp(z)`` over the whole vocabulary, the logarithm
        of the share of the tokens at or above the threshold (0 without one), and the entropy of
        ``softmax(z)`` in nats. The last three are NaN where the token is -1 (entropy and share may
        be numbers where no token is left).

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, or a negative temperature.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("logits", logits, dtypes=_DTYPES, shape=(None, None), strided=True)
    device, rows = logits.device, logits.shape[0]
    words = (torch.int64,)
    check_tensor("keys", keys, dtypes=words, shape=(rows, 2), device=device, strided=True)
    check_tensor("index", index, dtypes=words, shape=(rows,), device=device)
    if threshold is not None:
        sums = (torch.float32, torch.float64)
        check_tensor("threshold", threshold, dtypes=sums, shape=(rows,), device=device)
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            message("temperature", "a number of at least 0", temperature, "0 is greedy")
        )
    if not logits.shape[1]:
        raise ValueError(message("logits", "at least one token", logits, "pass a vocabulary"))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return op.gumbel_sample(logits, keys, index, threshold, float(temperature), impl)


def logit_threshold(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor | None:
    """Return the smallest ``z = logits / temperature`` that the filters keep, by plain torch.

    In the order of transformers: the ``top_k`` largest, of these the fewest whose probability
    reaches ``top_p``, of these those at least ``min_p`` times as likely as the likeliest. Tokens
    that tie with the last one kept are kept too. Costs a sort of each row where ``top_p < 1``.

    Args:
        logits: float ``(S, V)``.
        temperature: As in `gumbel_sample`, positive.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.

    Returns:
        float ``(S,)``, or None if all tokens are kept.
    """
    if not (0 < top_k < logits.shape[1]) and top_p >= 1 and min_p <= 0:
        return None
    z = logits.to(reference.accumulate_dtype(logits.dtype)) / temperature
    limit = torch.full_like(z[:, 0], float("-inf"))
    if 0 < top_k < z.shape[1]:
        limit = z.topk(top_k).values[:, -1]
    if top_p < 1:
        falling = z.masked_fill(z < limit[:, None], float("-inf")).sort(descending=True).values
        share = falling.softmax(-1)
        before = share.cumsum(-1) - share
        kept = (before < top_p) & (falling > float("-inf"))
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        limit = torch.maximum(limit, falling.gather(1, count - 1)[:, 0])
    if min_p > 0:
        limit = torch.maximum(limit, z.amax(-1) + torch.log(z.new_tensor(min_p)))
    return limit


@dataclass
class SlotState:
    """What `slot_refill_` works on: S slots, of which ``places`` take rows, and R rows.

    Attributes:
        slots: int64 ``(SLOT_FIELDS, S)``: row (-1 where idle), newest token, own tokens with the
            newest, its position, prefix, its start and length, and the two words of the key.
        rows: int64 ``(ROW_FIELDS, R + 1)``: tokens so far, most tokens, reason of the end, prefix,
            its start and length, and the two words of the key; the last row belongs to no sample.
        queue: int64 ``(R,)``, rows that wait, in order.
        counters: int64: next place of the queue, its end, rows that have ended, steps until the
            last in which a slot was busy, the sum of busy slots over steps, and all steps.
        order: int64 ``(S,)``, slots by prefix.
        tiles: int64 ``(2, S + 1)``: first place in ``order`` and number of slots of each tile.
        tokens: int32 ``(R + 1, T)``, written.
        logprobs: float32 ``(R + 1, T)``, written.
        places: Slots that take rows; the others stay idle.
        tile: Most slots of a tile.
    """

    slots: Tensor
    rows: Tensor
    queue: Tensor
    counters: Tensor
    order: Tensor
    tiles: Tensor
    tokens: Tensor
    logprobs: Tensor
    places: int
    tile: int

    @classmethod
    def empty(
        cls,
        slots: int,
        rows: int,
        most: int,
        *,
        places: int | None = None,
        tile: int = 16,
        device: torch.device | str = "cpu",
    ) -> SlotState:
        """Return idle slots, for rows of at most ``most`` tokens."""
        check_range("slots", slots, 1, 1 << 20, "pass the number of slots")
        check_range("rows", rows, 0, 1 << 40, "pass the number of samples")
        check_range("most", most, 1, 1 << 31, "pass the largest number of tokens")

        def make(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        state = cls(
            make(f.SLOT_FIELDS, slots), make(f.ROW_FIELDS, rows + 1), make(rows), make(f.COUNTERS),
            torch.arange(slots, device=device), make(2, slots + 1),
            make(rows + 1, most, dtype=torch.int32), make(rows + 1, most, dtype=torch.float32),
            slots if places is None else places, tile,
        )  # fmt: skip
        state.slots[f.ROW] = state.slots[f.PREFIX] = -1
        return state


def slot_refill_(
    state: SlotState,
    token: Tensor,
    logprob: Tensor,
    eos: Tensor,
    *,
    record: bool = True,
    impl: str = "auto",
) -> None:
    """Write the newest tokens, free the slots of ended rows, and fill free slots from the queue.

    A row ends by a token of ``eos``, by its limit, or by a token of -1, which is not written. Free
    slots take waiting rows in order of their number, so what a slot holds is a function of the
    tokens alone. One launch; the host asks the device nothing.

    Args:
        state: All of it is written but the queue.
        token: int64 ``(S,)``, drawn for each slot; those of idle slots count nothing.
        logprob: float ``(S,)``.
        eos: int64 ``(E,)``, tokens that end a row.
        record: False only fills free slots.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    slots = state.slots.shape[1]
    check: Any = {"device": state.slots.device}
    check_tensor("token", token, dtypes=(torch.int64,), shape=(slots,), **check)
    check_tensor("logprob", logprob, dtypes=_DTYPES, shape=(slots,), **check)
    check_tensor("eos", eos, dtypes=(torch.int64,), shape=(None,), **check)
    op.slot_refill_(
        state.slots, state.rows, state.queue, state.counters, state.order, state.tiles,
        state.tokens, state.logprobs, token, logprob, eos, state.places, state.tile, record, impl,
    )  # fmt: skip
