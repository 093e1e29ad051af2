"""Many trainings of a small model at once, each without other samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from torch import Tensor
from torch.func import grad, vmap
from tqdm.auto import tqdm

from sam_if.objective import ParameterVector
from sam_if.perturbation import Perturbation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from sam_if.objective import Objective


def retrain_together(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[tuple[Any, Sequence[int] | Tensor]],
    rates: Sequence[float],
    removals: Sequence[Sequence[int]],
    *,
    rho: float,
    adaptive: bool = False,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    norm_eps: float = 1e-12,
    queries: Iterable[Any] | None = None,
    together: int = 64,
    progress: bool = False,
) -> Tensor:
    """Train by SAM around SGD once without each of some sets of samples.

    All trainings see the same batches. A sample that is left out keeps its place with weight 0,
    and what is divided by stays. They are one training of ``(m, p)`` weights, so that small models
    cost little more than one of them; each comes out as it would alone, but for rounding.

    Args:
        model: With the weights that training begins with, which it keeps. It must be one for
            ``torch.func``, without what is random, and without batch norm in training mode.
        objective: Its losses.
        batches: Each with the numbers of its samples among the training data.
        rates: Of learning, one for each batch.
        removals: Numbers of the samples that each training does without; none for all data.
        rho: Radius of the neighbourhood; 0 is SGD.
        adaptive: ASAM.
        momentum: Of ``torch.optim.SGD``, as are the next three.
        dampening: Of the momentum.
        nesterov: Whether the momentum looks ahead.
        weight_decay: At the weights, outside of the perturbation.
        norm_eps: c of the perturbation.
        queries: Batches, as the objective measures them.
        together: Trainings at a time; memory grows with them.
        progress: Show a bar.

    Returns:
        Weights behind each training, ``(m, p)``, or with queries what they measure, ``(m, Q)``.

    Raises:
        ValueError: No batches or no removals, another number of rates, or samples that are in no
            batch.
    """
    check_range("together", together, 1, 1 << 31, "as many as memory allows")
    steps = [(batch, torch.as_tensor(samples).long().cpu()) for batch, samples in batches]
    if not steps or not len(removals):
        got = f"{len(steps)}, {len(removals)}"
        raise ValueError(message("batches", "some, and removals", got, "there is nothing to train"))
    if len(rates) != len(steps):
        remedy = "one for each batch"
        raise ValueError(message("rates", f"{len(steps)} numbers", len(rates), remedy))
    count = 1 + max(int(samples.max()) for _, samples in steps)
    seen = torch.zeros(count, dtype=torch.bool)
    for _, samples in steps:
        seen[samples] = True
    every = sorted({int(n) for removed in removals for n in removed})
    if unknown := [n for n in every if not 0 <= n < count or not seen[n]]:
        remedy = "they were never trained on"
        raise ValueError(message("removals", "samples of the batches", unknown[:3], remedy))
    vector = ParameterVector(model, objective)
    begin = vector.read()
    kept = begin.new_ones(len(removals), count)
    for row, removed in zip(kept, removals, strict=True):
        row[[int(n) for n in removed]] = 0
    asked = None if queries is None else list(queries)

    def measured(w: Tensor) -> Tensor:
        return torch.cat([vector.losses(w, query, measured=True) for query in asked or []])

    found, parts = [], kept.split(together)
    with tqdm(total=len(steps) * len(parts), desc="farm", disable=not progress) as bar:
        for part in parts:
            w, buffer = begin.expand(len(part), -1), None
            for (batch, samples), rate in zip(steps, rates, strict=True):

                def pull(w: Tensor, a: Tensor, batch: Any = batch) -> Tensor:
                    loss = lambda at: a @ vector.losses(at, batch) / len(a)  # noqa: E731
                    moved = Perturbation(w, grad(loss)(w), rho, adaptive, norm_eps)
                    return grad(loss)(w + moved.epsilon)

                v = vmap(pull)(w, part[:, samples.to(part.device)]) + weight_decay * w
                if momentum:
                    buffer = v if buffer is None else momentum * buffer + (1 - dampening) * v
                    v = v + momentum * buffer if nesterov else buffer
                w = w - float(rate) * v
                bar.update()
            found.append(w if asked is None else vmap(measured)(w))
    return torch.cat(found).detach()
