"""Public functions: distillation of a linear head without stored logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.distill import op
from shared_kernels.ops.distill.arguments import (
    check_head,
    check_labels,
    check_options,
    check_rows,
    check_sparse,
    divisor,
    merge_repeats,
    normalised,
)
from shared_kernels.ops.distill.reference import accumulate_dtype, combine

if TYPE_CHECKING:
    from collections.abc import Sequence


class Distillation(NamedTuple):
    """A loss and what it is made of; only the loss has a gradient.

    All are 0-dimensional, float32 (float64 for float64), and divided as the loss is: with
    ``reduction="mean"`` each is the mean over the rows that count for it.

    Attributes:
        loss: ``(1 - kd_weight) lm + kd_weight tau^2 (kl + entropy)``; for a head of several times
            its weight.
        lm: ``lse(s) - s_y``.
        kl: ``KL(q || p)`` at the temperature, or None if the teacher was sampled.
        entropy: ``H(q)`` of the teacher, or None if it was sampled.
        agreement: Share of the rows where the teacher's best token has the student's largest
            logit, or None if the teacher was sampled.
        cross_entropy: ``-sum_v q_v log p_v``, which is ``kl + entropy``.
    """

    loss: Tensor
    lm: Tensor
    kl: Tensor | None
    entropy: Tensor | None
    agreement: Tensor | None
    cross_entropy: Tensor


class HeadsDistillation(NamedTuple):
    """Losses of several heads.

    Attributes:
        loss: Their sum, which has a gradient.
        heads: `Distillation` of each, without gradients.
    """

    loss: Tensor
    heads: tuple[Distillation, ...]


class TeacherSample(NamedTuple):
    """Tokens drawn from a teacher's law.

    Attributes:
        indices: int32 ``(N, rounds)``, with repeats.
        weights: float ``(N, rounds)``, what each draw counts for.
    """

    indices: Tensor
    weights: Tensor


def fused_linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    kd_weight: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    distill_ignored: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> Distillation:
    """Compute ``(1 - kd_weight) LM + kd_weight tau^2 CE(q, p)`` of a student and its teacher.

    ``s = hidden weight^T``, ``t = teacher_hidden teacher_weight^T``, ``p = softmax(s / tau)``,
    ``q = softmax(t / tau)``, ``LM = lse(s) - s_y`` (arXiv:2605.08738, whose tau is 1; its CE is the
    KL divergence plus the teacher's entropy and has the same gradient). The gradient of a row's
    logits is ``(1 - kd_weight) (softmax(s) - e_y) + kd_weight tau (p - q)``.

    Logits are float32 (float64 for float64) and exist for a chunk of rows; their gradient is
    rounded to the dtype of ``hidden`` for the two products with it, whose sums are float32. The
    gradients are computed with the loss, if any is wanted, and kept in float32 until backward:
    ``4 (V + N) H`` bytes. ``2 N V (3 H + H_t)`` FLOPs, ``2 N V (H + H_t)`` without a gradient.
    The result repeats bit for bit on the same device. The host waits for the device a few times,
    to learn which rows count and to check ids.

    A row whose label is ``ignore_index`` counts in neither term, so that prompts and padding cost
    nothing. Where no row counts the loss is 0. If one head has more rows than the other, tokens
    beyond the smaller vocabulary are taken for padding: they have no probability on either side,
    and no gradient.

    Args:
        hidden: float ``(N, H)``, the student's final hidden states.
        weight: float ``(V, H)``, its head.
        teacher_hidden: float ``(N, H_t)``; the teacher gets no gradient.
        teacher_weight: float ``(V_t, H_t)``.
        labels: int64 ``(N,)``, the next tokens.
        kd_weight: Of the distillation term, in ``[0, 1]``.
        temperature: tau.
        ignore_index: The label of rows that do not count.
        reduction: ``mean`` divides each term by the number of rows that count for it; ``sum`` does
            not.
        num_items: What to divide sums by instead, for instance the labels in all batches of a step
            (``num_items_in_batch`` of transformers).
        distill_ignored: Rows without a label count in the distillation term.
        chunk_size: Rows whose logits exist at a time; by default as many as 2.4 GB of them on a GPU
            and 64 MB on a CPU.
        impl: ``auto``, ``triton``, ``split`` (plain torch, in place) or ``reference``.

    Raises:
        TypeError: A dtype that is not listed, or heads of different precision.
        ValueError: Shapes or devices that do not fit together, a label outside the vocabulary, or
            an option out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_head("", hidden, weight)
    check_head("teacher_", teacher_hidden, teacher_weight, count=hidden.shape[0], student=hidden)
    check_labels(labels, hidden)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    found = _distill(
        [hidden], weight, teacher_hidden, teacher_weight, [labels], [rows], [kd_weight], [1.0],
        temperature, ignore_index, reduction, num_items, distill_ignored, chunk_size, impl,
    )  # fmt: skip
    return found.heads[0]._replace(loss=found.loss)


def fused_linear_distillation_heads(
    hidden: Sequence[Tensor],
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Sequence[Tensor],
    *,
    rows: Sequence[Tensor],
    kd_weight: float | Sequence[float],
    head_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    distill_ignored: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> HeadsDistillation:
    """Sum the losses of several states that share a head, and a teacher whose logits are made once.

    A module for multi-token prediction of depth k has row i predict token ``i + k + 1``, which is
    what the teacher's row ``i + k`` predicts: its rows are ``i + k``, and -1 where that is in
    another sequence or beyond the end (arXiv:2605.08738, with indices from 0). The loss is
    ``sum_h head_weights[h] loss_h`` with `fused_linear_distillation` as ``loss_h``, whose other
    arguments mean the same here. ``2 N V (3 H heads + H_t)`` FLOPs.

    Args:
        hidden: float ``(N_h, H)`` of each head.
        weight: float ``(V, H)``, for all of them.
        teacher_hidden: float ``(M, H_t)``.
        teacher_weight: float ``(V_t, H_t)``.
        labels: int64 ``(N_h,)`` of each head, what its rows predict.
        rows: int64 ``(N_h,)`` of each head, the teacher's row of each of its rows; -1 if there is
            none: such a row counts in neither term. A row may serve any number of others.
        kd_weight: Of the distillation term, of all heads or of each.
        head_weights: Of the heads' losses, by default 1.
        temperature: tau.
        ignore_index: The label of rows that do not count.
        reduction: ``mean`` or ``sum``, of each head.
        num_items: What to divide the sums of every head by instead.
        distill_ignored: Rows without a label count in the distillation term.
        chunk_size: Rows of the teacher whose logits exist at a time, and of a head.
        impl: ``auto``, ``triton``, ``split`` or ``reference``.

    Raises:
        TypeError: A dtype that is not listed, or heads of different precision.
        ValueError: Shapes or devices that do not fit together, a label outside the vocabulary, a
            row outside the teacher's, or an option out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    count = len(hidden)
    kd_weights = [kd_weight] * count if isinstance(kd_weight, int | float) else list(kd_weight)
    given = [1.0] * count if head_weights is None else list(head_weights)
    remedy = "pass one of each for every head"
    lists = {"labels": labels, "rows": rows, "kd_weight": kd_weights, "head_weights": given}
    for name, values in lists.items():
        if not count or len(values) != count:
            raise ValueError(message(name, f"as many as hidden, {count} > 0", len(values), remedy))
    check_head("teacher_", teacher_hidden, teacher_weight, student=hidden[0])
    for index in range(count):
        check_head("", hidden[index], weight, f"hidden[{index}]")
        check_labels(labels[index], hidden[index], f"labels[{index}]")
        check_rows(rows[index], hidden[index], f"rows[{index}]")
    return _distill(
        list(hidden), weight, teacher_hidden, teacher_weight, list(labels), list(rows), kd_weights,
        given, temperature, ignore_index, reduction, num_items, distill_ignored, chunk_size, impl,
    )  # fmt: skip


def _distill(
    hidden: list[Tensor],
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: list[Tensor],
    rows: list[Tensor],
    kd_weights: list[float],
    head_weights: list[float],
    temperature: float,
    ignore_index: int,
    reduction: str,
    num_items: float | Tensor | None,
    distill_ignored: bool,
    chunk_size: int | None,
    impl: str,
) -> HeadsDistillation:
    check_options(kd_weights, head_weights, temperature, reduction, num_items, chunk_size)
    dtype = accumulate_dtype(weight.dtype)
    taken, lm_weights, kd_weights_of_rows, divisors = [], [], [], []
    for label, row, kd_weight, head in zip(labels, rows, kd_weights, head_weights, strict=True):
        labelled = label != ignore_index
        counts = row != -1 if distill_ignored else (row != -1) & labelled
        labelled = labelled & counts
        taken.append(torch.where(counts, row, -1))
        parts = [divisor(mask, reduction, num_items, dtype) for mask in (labelled, counts)]
        divisors.append(parts)
        lm_weights.append(labelled.to(dtype) * (head * (1 - kd_weight)) / parts[0])
        kd_weights_of_rows.append(counts.to(dtype) * (head * kd_weight) / parts[1])
    lm_weight, kd_weight_of_row = torch.cat(lm_weights), torch.cat(kd_weights_of_rows)
    factor, scaled = normalised(lm_weight, kd_weight_of_row)
    recording = torch.is_grad_enabled()
    stats, d_hidden, d_weight = op.linear_distillation(
        [part.detach() for part in hidden],
        weight.detach(),
        teacher_hidden.detach(),
        teacher_weight.detach(),
        torch.cat(labels),
        torch.cat(taken),
        *scaled,
        float(temperature),
        ignore_index,
        chunk_size or 0,
        recording and any(part.requires_grad for part in hidden),
        recording and weight.requires_grad,
        impl,
    )
    sizes = [part.shape[0] for part in hidden]
    shares = zip(
        stats.split(sizes), lm_weight.split(sizes), kd_weight_of_row.split(sizes), divisors,
        strict=True,
    )  # fmt: skip
    heads = tuple(_summary(*share, temperature) for share in shares)
    loss = torch.stack([head.loss for head in heads]).sum()
    if d_hidden or d_weight.numel():
        known = d_hidden or [d_weight.new_empty(0)] * len(hidden)
        loss = op.WithGradients.apply(loss, factor, weight, *hidden, d_weight, *known)
    return HeadsDistillation(loss, heads)


def _summary(
    stats: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    divisors: list[Tensor],
    temperature: float,
    sampled: bool = False,
) -> Distillation:
    """Add up the rows of a head."""
    lm, kl, entropy, agreement = stats.sum(0) / torch.stack([divisors[0], *[divisors[1]] * 3])
    loss = combine(stats, lm_weight, kd_weight, temperature)
    if sampled:
        return Distillation(loss, lm, None, None, None, kl)
    return Distillation(loss, lm, kl, entropy, agreement, kl + entropy)


def sparse_distillation(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor | None,
    labels: Tensor,
    *,
    kd_weight: float,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    distill_ignored: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> Distillation:
    """Compute `fused_linear_distillation` for a teacher of which K numbers a row are known.

    With ``log_probs``, those of the teacher at the temperature, the tokens that are not listed are
    one: ``r = 1 - sum_K q`` against the student's ``P = 1 - sum_K p``. The gradient of the logits
    is ``p - q`` on the K tokens and ``p (1 - r / P)`` off them. That is what can be learnt from
    top-k, and no estimate of the whole: all K = V tokens give `fused_linear_distillation`.

    With ``weights``, of `sample_teacher`, the term is ``-sum_K w_k log p_k``, whose gradient
    ``(sum_K w) p - w`` is in expectation that of the whole law (arXiv:2503.16870).

    ``2 N V 3 H`` FLOPs; other arguments, and what rows count, as in `fused_linear_distillation`.

    Args:
        hidden: float ``(N, H)``, the student's final hidden states.
        weight: float ``(V, H)``, its head.
        indices: int32 or int64 ``(N, K)``, tokens; -1 is no entry.
        log_probs: float ``(N, K)``, of tokens that differ within a row; or None.
        labels: int64 ``(N,)``, the next tokens.
        kd_weight: Of the distillation term, in ``[0, 1]``.
        weights: float ``(N, K)``, not negative; tokens may repeat.
        temperature: tau, of the student and of what is known of the teacher.
        ignore_index: The label of rows that do not count.
        reduction: ``mean`` or ``sum``.
        num_items: What to divide sums by instead.
        distill_ignored: Rows without a label count in the distillation term.
        chunk_size: Rows whose logits exist at a time.
        impl: ``auto``, ``triton`` (of at most 1024 tokens a row), ``split`` or ``reference``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, a token outside the vocabulary or
            listed twice, both or none of ``log_probs`` and ``weights``, or an option out of range.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_head("", hidden, weight)
    check_labels(labels, hidden)
    check_options([kd_weight], [1.0], temperature, reduction, num_items, chunk_size)
    known = check_sparse(indices, log_probs, weights, hidden)
    dtype = accumulate_dtype(weight.dtype)
    tail = weights is None
    logs = known.to(dtype)
    if not tail:
        indices, logs = merge_repeats(indices, logs)
    labelled = labels != ignore_index
    counts = torch.ones_like(labelled) if distill_ignored else labelled
    divisors = [divisor(mask, reduction, num_items, dtype) for mask in (labelled, counts)]
    lm_weight = labelled.to(dtype) * (1 - kd_weight) / divisors[0]
    kd_weights = counts.to(dtype) * kd_weight / divisors[1]
    factor, scaled = normalised(lm_weight, kd_weights)
    recording = torch.is_grad_enabled()
    stats, d_hidden, d_weight = op.sparse_distillation(
        hidden.detach(),
        weight.detach(),
        indices,
        logs,
        labels,
        counts,
        *scaled,
        float(temperature),
        ignore_index,
        tail,
        chunk_size or 0,
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
        impl,
    )
    found = _summary(stats, lm_weight, kd_weights, divisors, temperature, sampled=not tail)
    if recording and (hidden.requires_grad or weight.requires_grad):
        loss = op.WithGradients.apply(found.loss, factor, weight, hidden, d_weight, d_hidden)
        found = found._replace(loss=loss)
    return found


def sample_teacher(
    logits: Tensor,
    rounds: int,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
    power: float = 1.0,
) -> TeacherSample:
    """Draw tokens of a teacher for `sparse_distillation`: sparse logit sampling (arXiv:2503.16870).

    Tokens are drawn with repeats from ``softmax(power t / tau)``, and a draw of v counts for
    ``q_v / (rounds proposal_v)`` of ``q = softmax(t / tau)``, so that the weights of v have q_v as
    expectation. With ``power=1`` all weights are ``1 / rounds``.

    Args:
        logits: float ``(N, V)``, of the teacher, of a chunk of rows.
        rounds: Draws of each row.
        generator: Of the draws, on the logits' device.
        temperature: tau.
        power: Below 1 draws rare tokens more often.

    Raises:
        TypeError: A dtype that is not a float, or rounds that are no integer.
        ValueError: No draw, or a number that is not positive.
    """
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_tensor("logits", logits.detach(), dtypes=floats, shape=(None, None), strided=True)
    check_range("rounds", rounds, 1, 1 << 31, "draw at least once")
    for name, value in (("temperature", temperature), ("power", power)):
        if not value > 0:
            raise ValueError(message(name, "a positive number", value, "1 is usual"))
    scaled = logits.detach().to(accumulate_dtype(logits.dtype)) / temperature
    if not len(scaled):
        empty = scaled.new_empty(0, rounds)
        return TeacherSample(empty.int(), empty)
    proposal = torch.softmax(scaled * power, -1)
    drawn = torch.multinomial(proposal, rounds, replacement=True, generator=generator)
    weights = torch.full_like(drawn, 1.0, dtype=scaled.dtype)
    if power != 1:
        law = torch.softmax(scaled, -1)
        weights = law.gather(1, drawn) / proposal.gather(1, drawn)
    return TeacherSample(drawn.int(), weights / rounds)
