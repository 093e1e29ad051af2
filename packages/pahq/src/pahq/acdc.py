"""ACDC with the decisions of the sequential algorithm, many edges at a time.

Edges of one receiver are removed one after the other, each for good if the metric rises by less
than a threshold (Conmy et al., arXiv:2304.14997, algorithm 1). Here rows of one batch have the
first edge removed, the first two, the first three: as long as all of them go, one batch decides as
many edges as it has rows; after the first one that stays, the next batch begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pahq.forward import State


@dataclass
class Search:
    """How a search went.

    Attributes:
        value: The metric of the circuit.
        tested: Edges that were tried.
        skipped: Edges removed because nothing reads what they reach.
        kept: Edges that stayed.
        batches: Forward passes over what follows a receiver.
        rows: In all of them.
        effects: By edge ``(sender, receiver)``, what its removal added to the metric when it was
            tried.
    """

    value: float
    tested: int = 0
    skipped: int = 0
    kept: int = 0
    batches: int = 0
    rows: int = 0
    effects: dict[tuple[int, int], float] = field(default_factory=dict)


@torch.no_grad()
def search(
    state: State,
    metric: Callable[[Tensor], Tensor],
    threshold: float,
    *,
    rows: int = 32,
    absolute: bool = False,
    progress: bool = False,
) -> Search:
    """Remove edges of a run until each one left matters.

    Args:
        state: Of all edges; it is the circuit's afterwards.
        metric: Of final states ``(M, N, T, D)``, a number for each row ``(M,)``, to be kept low.
        threshold: An edge stays if its removal adds at least so much.
        rows: Of a batch at most.
        absolute: Whether an edge also stays if its removal takes off so much.
        progress: Whether to show a bar.

    Raises:
        FloatingPointError: The metric is not finite.
    """
    from tqdm.auto import tqdm

    graph = state.executor.graph
    found = Search(float(metric(state.final[None])[0]))
    with tqdm(total=graph.edges, desc="acdc", unit="edge", disable=not progress) as bar:
        for receiver in graph.order():
            live, receivers = state.live()
            candidates = [s for s in graph.candidates(receiver) if bool(state.present[s, receiver])]
            if not bool(receivers[receiver]):
                state.present[:, receiver] = False
                state.inputs[receiver] = state.corrupted.read(graph, receiver)
                found.skipped += len(candidates)
                bar.update(len(candidates))
                continue
            while candidates:
                batch = candidates[:rows]
                delta = (state.corrupted.senders[batch] - state.senders[batch]).cumsum(0)
                made = state.change(receiver, delta, live)
                final = made.inputs.get(graph.logits)
                after = [found.value] * len(batch)
                if final is not None:
                    after = metric(state.final + final).tolist()
                found.batches += 1
                found.rows += len(batch)
                gone = 0
                for sender, value in zip(batch, after, strict=True):
                    effect = value - found.value
                    if not math.isfinite(value):
                        raise FloatingPointError(
                            f"metric: {value} without edge {graph.name(sender, receiver)}"
                        )
                    found.effects[sender, receiver] = effect
                    found.tested += 1
                    if (abs(effect) if absolute else effect) >= threshold:
                        found.kept += 1
                        break
                    found.value = value
                    gone += 1
                if gone:
                    state.take(made, gone - 1)
                    state.present[batch[:gone], receiver] = False
                candidates = candidates[gone + (gone < len(batch)) :]
                bar.update(gone + (gone < len(batch)))
                bar.set_postfix(kept=found.kept, metric=f"{found.value:.4f}", refresh=False)
    return found
