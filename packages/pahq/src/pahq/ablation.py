"""What absent edges carry: the corrupted run, nothing, or a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pahq.forward import PlainRun

if TYPE_CHECKING:
    from torch import Tensor

    from pahq.forward import Executor

ABLATIONS = ("patch", "zero", "mean", "mean_positional")


@torch.no_grad()
def ablated(executor: Executor, run: PlainRun, kind: str, positions: Tensor) -> PlainRun:
    """Return what absent edges carry.

    - ``patch``: what their senders computed in the corrupted run itself.
    - ``zero``: nothing. Biases of what heads write belong to no sender, and stay.
    - ``mean``: the mean of what each sender computed in the corrupted run, over examples and
      positions.
    - ``mean_positional``: the mean over examples, at each position.

    Args:
        executor: Of the model.
        run: On the corrupted inputs.
        kind: One of these.
        positions: int64 ``(N,)``, the last token of each example that counts; means leave out the
            tokens behind it, unless attention sees them.
    """
    if kind == "patch":
        return run
    if kind == "zero":
        return from_senders(executor, torch.zeros_like(run.senders))
    index = torch.arange(run.senders.shape[2], device=run.senders.device)
    counts = (index <= positions.to(index.device)[:, None]).to(run.senders.dtype)
    if not executor.adapter.causal:
        counts = torch.ones_like(counts)
    over = (0, 1) if kind == "mean" else (0,)
    dims = (1, 2) if kind == "mean" else (1,)
    total = (run.senders * counts[:, :, None]).sum(dims, keepdim=True)
    # no example counts at a position behind all of them, and none is read there
    number = counts.sum(over, keepdim=True).clamp(min=1)
    mean = total / number.view(1, 1, -1, 1)
    return from_senders(executor, mean.expand_as(run.senders).contiguous())


def from_senders(executor: Executor, senders: Tensor) -> PlainRun:
    """Return the run in which every sender computes what is given, ``(S, N, T, D)``."""
    adapter, graph = executor.adapter, executor.graph
    x = senders[0]
    attention, mlp = (x.new_empty(graph.layers, *x.shape) for _ in range(2))
    for layer in range(graph.layers):
        attention[layer] = x
        first = graph.head(layer, 0)
        after = x + senders[first : first + graph.heads].sum(0)
        bias = adapter.output(layer)[1]
        if bias is not None:
            after = after + bias.to(x.dtype)
        mlp[layer] = x if graph.parallel else after
        x = after + senders[graph.mlp(layer)]
    return PlainRun(senders, attention, mlp, x)
