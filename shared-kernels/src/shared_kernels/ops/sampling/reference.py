"""Definitions: sampling by Gumbel-max, and the refill of free slots."""

import torch
from torch import Tensor

from shared_kernels.ops.sampling import fields as f
from shared_kernels.random import constants as k
from shared_kernels.random import reference as random

_MASK = (1 << 32) - 1


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gumbel_noise(keys: Tensor, index: Tensor, vocab: int) -> Tensor:
    """Draw the noise of a token: ``(S, V)`` from keys ``(S, 2)`` and indices ``(S,)``.

    Token ``v`` reads word ``(v // 256) % 4`` of the Philox block whose counter is
    ``(v // 1024 * 256 + v % 256, index, 0, DOMAIN_TOKEN << 24)``.
    """
    blocks = torch.arange(-(-vocab // 1024) * 256, device=keys.device)
    counter = torch.stack(
        torch.broadcast_tensors(
            blocks, index[:, None], torch.zeros_like(blocks),
            torch.full_like(blocks, k.DOMAIN_TOKEN << k.DOMAIN_SHIFT),
        ), -1,
    )  # fmt: skip
    words = random.philox4x32(counter & _MASK, keys[:, None] & _MASK)
    words = words.unflatten(1, (-1, 256)).transpose(2, 3).flatten(1)
    return random.gumbel(words)[:, :vocab]


def gumbel_sample(
    logits: Tensor, keys: Tensor, index: Tensor, threshold: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take the token with the largest ``z_v + gumbel_v``, ``z = logits / temperature``.

    The largest of ``z_v + gumbel_v`` is at ``v`` with probability ``softmax(z)_v`` (Gumbel, 1954).
    A temperature of 0 takes the largest logit, and ``z = logits``.
    """
    z = logits.to(accumulate_dtype(logits.dtype))
    if temperature > 0:
        z = z / temperature
    vocab = z.shape[1]
    total = z.logsumexp(-1)
    falls = z - total[:, None]
    entropy = -torch.where(falls == float("-inf"), 0.0, falls.exp() * falls).sum(-1)
    score = z + gumbel_noise(keys, index, vocab) if temperature > 0 else z
    kept = torch.zeros_like(total)
    if threshold is not None:
        hidden = z < threshold[:, None].to(z.dtype)
        score = score.masked_fill(hidden, float("-inf"))
        kept = z.masked_fill(hidden, float("-inf")).logsumexp(-1) - total
    best = score.amax(-1, keepdim=True)
    order = torch.arange(vocab, device=z.device)
    token = torch.where(score == best, order, vocab).amin(-1)
    bad = ~total.isfinite() | (token == vocab)
    token = token.masked_fill(bad, -1)
    logprob = z.gather(1, token.clamp(min=0)[:, None])[:, 0] - total
    return token, logprob.masked_fill(bad, float("nan")), kept, entropy


def slot_refill_(
    slots: Tensor,
    rows: Tensor,
    queue: Tensor,
    counters: Tensor,
    order: Tensor,
    tiles: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    token: Tensor,
    logprob: Tensor,
    eos: Tensor,
    places: int,
    tile: int,
    record: bool,
) -> None:
    """Write the newest tokens, free the slots of ended rows, and fill free slots from the queue.

    The last row of ``rows`` and ``tokens`` belongs to no sample: idle slots write there.
    """
    lanes = torch.arange(slots.shape[1], device=slots.device)
    last = rows.shape[1] - 1
    active = slots[f.ROW] >= 0
    ended = torch.zeros_like(active)
    if record:
        row = torch.where(active, slots[f.ROW], last)
        count = rows[f.COUNT, row]
        good = active & (token >= 0)
        target = torch.where(good, row, last)
        tokens[target, torch.where(good, count, 0)] = token.clamp(min=0).to(tokens.dtype)
        logprobs[target, torch.where(good, count, 0)] = logprob.to(logprobs.dtype)
        count = count + good
        reason = torch.where(count >= rows[f.LIMIT, row], f.CUT, f.RUNNING)
        reason = torch.where((token[:, None] == eos).any(1), f.STOPPED, reason)
        reason = torch.where(token < 0, f.NOT_FINITE, reason)
        rows[f.COUNT, row], rows[f.REASON, row] = count, reason
        rows[:, last] = 0
        ended = active & (reason > 0)
        counters[f.FINISHED] += ended.sum()
        counters[f.CLOCK] += 1
        counters[f.STEPS] = torch.where(active.any(), counters[f.CLOCK], counters[f.STEPS])
        counters[f.BUSY] += active.sum()
    free = (~active | ended) & (lanes < places)
    place = counters[f.HEAD] + free.cumsum(0) - free.long()
    taken = free & (place < counters[f.TAIL])
    if len(queue):
        waiting = queue[place.clamp(max=len(queue) - 1)]
        slots[f.ROW] = torch.where(taken, waiting, slots[f.ROW].masked_fill(ended, -1))
    else:
        slots[f.ROW] = slots[f.ROW].masked_fill(ended, -1)
    counters[f.HEAD] += taken.sum()

    active = slots[f.ROW] >= 0
    row = torch.where(active, slots[f.ROW], last)
    count = rows[f.COUNT, row]
    slots[f.TOKEN] = torch.where(active, tokens[row, (count - 1).clamp(min=0)].long(), 0)
    slots[f.LENGTH] = torch.where(active, count, 0)
    slots[f.PREFIX :] = rows[f.ROW_PREFIX :, row]
    slots[f.PREFIX] = slots[f.PREFIX].masked_fill(~active, -1)
    slots[f.POSITION] = torch.where(active, slots[f.PREFIX_LENGTH] + count - 1, 0)

    # slots that share a prefix lie side by side in `order`, cut into tiles
    far = torch.iinfo(slots.dtype).max
    group, found = slots[f.PREFIX].masked_fill(~active, far).sort(stable=True)
    order.copy_(found)
    first, end = torch.searchsorted(group, group), torch.searchsorted(group, group, right=True)
    leads = ((lanes - first) % tile == 0) & (group < far)
    number = torch.where(leads, leads.cumsum(0) - 1, len(lanes))
    tiles.zero_()
    tiles[0, number] = lanes
    tiles[1, number] = torch.minimum(end - lanes, torch.full_like(end, tile))
    tiles[:, len(lanes)] = 0
