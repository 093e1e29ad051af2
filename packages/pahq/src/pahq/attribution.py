"""Scores of all edges at once, by gradients.

The effect of an edge to first order is what its sender has different in the corrupted run, times
the gradient of the metric by what its receiver reads (edge attribution patching, Syed et al.,
arXiv:2310.10348). Integrated gradients take the mean gradient between the corrupted and the clean
embeddings (EAP-IG, Hanna et al., arXiv:2403.17806), which also tells where the gradient at the
clean input is 0, as that of KL is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pahq.forward import Executor, PlainRun


def gradients(
    executor: Executor, embedded: Tensor, metric: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the gradient of a metric by what each receiver reads.

    Args:
        executor: Of the model.
        embedded: ``(N, T, D)``, what enters the residual stream.
        metric: Of final states ``(1, N, T, D)``, ``(1,)``.

    Returns:
        For each layer ``(H + 2 K + 1, N, T, D)``, in the order of the receivers; at the end
        ``(1, N, T, D)`` for the logits.
    """
    adapter, graph = executor.adapter, executor.graph
    x, leaves = embedded.detach(), []

    def leaf(count: int) -> Tensor:
        found = x.new_zeros(count, *x.shape).requires_grad_()
        leaves.append(found)
        return found

    def behind(layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mlp: Tensor) -> Tensor:
        parts = {}
        for part, count, added in (
            ("q", graph.heads, q), ("k", graph.key_heads, k), ("v", graph.key_heads, v),
        ):  # fmt: skip
            parts[part] = executor.own(layer, part, range(count), x + added)
        keys, values = (parts[part].repeat_interleave(graph.group, 0) for part in "kv")
        written = executor.outputs(layer, range(graph.heads), parts["q"], keys, values)
        after = x + written.sum(0)
        bias = adapter.output(layer)[1]
        if bias is not None:
            after = after + bias.to(x.dtype)
        return after + adapter.mlp(layer, (x if graph.parallel else after) + mlp[0])

    with torch.enable_grad():
        for layer in range(graph.layers):
            added = [leaf(count) for count in (graph.heads, graph.key_heads, graph.key_heads, 1)]
            if adapter.streamer is None:
                x = behind(layer, x, *added)
            else:
                # a layer's weights are there while it runs: for gradients it runs once more
                x = checkpoint(behind, layer, x, *added, use_reentrant=False)
        final = x + leaf(1)[0]
        found = list(torch.autograd.grad(metric(final[None]).sum(), leaves))
    layers = [torch.cat(found[first : first + 4]) for first in range(0, 4 * graph.layers, 4)]
    return [*layers, found[-1]]


def edge_scores(
    executor: Executor,
    clean: PlainRun,
    corrupted: PlainRun,
    metric: Callable[[Tensor], Tensor],
    *,
    steps: int = 0,
) -> Tensor:
    """Return what the removal of each edge adds to a metric, to first order.

    Args:
        executor: Of the model.
        clean: Run on the clean inputs.
        corrupted: Run on the corrupted ones.
        metric: Of final states ``(1, N, T, D)``, ``(1,)``.
        steps: Points between corrupted and clean embeddings whose gradients are averaged (EAP-IG);
            0 takes the gradient at the clean input (EAP).

    Returns:
        ``(S, R)``, 0 where there is no edge.
    """
    graph = executor.graph
    first, last = corrupted.senders[0], clean.senders[0]
    mean: list[Tensor] = []
    for step in range(max(1, steps)):
        share = (step + 1) / steps if steps else 1.0
        found = gradients(executor, first + share * (last - first), metric)
        if not mean:
            mean = found
        else:
            for total, value in zip(mean, found, strict=True):
                total += value
    moved = corrupted.senders - clean.senders
    scores = moved.new_zeros(graph.senders, graph.receivers)
    for layer, gradient in enumerate(mean):
        columns = slice(layer * graph.width, layer * graph.width + len(gradient))
        scores[:, columns] = torch.einsum("sntd,rntd->sr", moved, gradient / max(1, steps))
    return scores * torch.from_numpy(graph.full()).to(scores.device)
