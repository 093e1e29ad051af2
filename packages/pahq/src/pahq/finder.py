"""From a model and a task to a circuit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message
from torch import nn

from pahq.acdc import search
from pahq.adapters import adapter_of
from pahq.attribution import edge_scores
from pahq.circuit import Circuit
from pahq.errors import UnsupportedModelError
from pahq.forward import Executor
from pahq.graph import Graph
from pahq.metrics import METRICS, Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pahq.tasks import Task

#: Largest distance of logits from the model's, over their largest absolute value.
_PARITY = 1e-4


class CircuitFinder:
    """Finds and judges circuits of a model.

    Args:
        model: A causal language model of transformers, of a family in `pahq.adapters.ADAPTERS`.
        kv: ``grouped``: query heads that share keys and values share their receivers, as in the
            model; ``per_query_head``: each has its own, as in TransformerLens.
        check: Whether to compare with the model's own logits first.

    Raises:
        UnsupportedModelError: Another family, a model whose dropout is on, or one whose logits are
            not reproduced.
    """

    def __init__(self, model: Any, *, kv: str = "grouped", check: bool = True) -> None:
        check_choice("kv", kv, ("grouped", "per_query_head"))
        self.model, self.adapter = model, adapter_of(model)
        if any(isinstance(m, nn.Dropout) and m.training and m.p for m in model.modules()):
            raise UnsupportedModelError(
                "model: its dropout is on, and no two runs would be the same; call model.eval()"
            )
        heads = self.adapter.heads
        self.graph = Graph(
            self.adapter.layers, heads, self.adapter.key_heads if kv == "grouped" else heads,
            self.adapter.parallel,
        )  # fmt: skip
        self.executor = Executor(self.adapter, self.graph)
        if check:
            self._check()

    @torch.no_grad()
    def _check(self) -> None:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (2, 12), generator=draws).to(self.adapter.device)
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            wanted = self.model(input_ids=ids, use_cache=False).logits.to(self.adapter.dtype)
        finally:
            for module in training:
                module.training = True
        found = self.adapter.logits(self.executor.plain(ids).final)
        distance = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
        if not distance <= self._tolerance():
            raise UnsupportedModelError(
                f"model: logits of {type(self.model).__name__} are not reproduced, off by "
                f"{distance:.1e} of the largest; it has a part that its adapter does not know "
                "(adapters, quantised weights, another attention), merge or remove it"
            )

    def _tolerance(self) -> float:
        # a model of 16 bits rounds its own activations
        return _PARITY if next(self.model.parameters()).element_size() >= 4 else 0.1

    # --- runs --------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, circuit: Circuit, clean: Tensor, corrupted: Tensor) -> Tensor:
        """Return logits ``(N, T, V)`` of a run on clean ids in which a circuit's edges are.

        Args:
            circuit: All other edges carry what they carry on the corrupted ids.
            clean: int64 ``(N, T)``.
            corrupted: int64 ``(N, T)``.

        Raises:
            ValueError: Ids of different shape, or a circuit of another model.
        """
        self._same(circuit)
        if clean.ndim != 2 or clean.shape != corrupted.shape:
            remedy = "clean and corrupted prompts must have as many tokens, one by one"
            shape = tuple(corrupted.shape)
            raise ValueError(message("corrupted", f"shape {tuple(clean.shape)}", shape, remedy))
        device = self.adapter.device
        base = self.executor.plain(corrupted.to(device))
        state = self.executor.run(circuit.present.to(device), clean.to(device), base)
        return self.adapter.logits(state.final)

    def acdc(
        self,
        task: Task,
        threshold: float,
        *,
        metric: str = "kl",
        absolute: bool = False,
        max_rows: int = 64,
        progress: bool = True,
    ) -> Circuit:
        """Find a circuit by ACDC: remove every edge that the metric does not miss.

        The edges are those that the sequential algorithm keeps (Conmy et al., arXiv:2304.14997),
        without its direct edges.

        Args:
            task: Clean and corrupted inputs.
            threshold: By how much a removal must raise the metric for the edge to stay, tau.
            metric: One of `pahq.METRICS`.
            absolute: Whether an edge that lowers the metric by so much stays, too.
            max_rows: Removals that are tried in one batch.
            progress: Whether to show a bar.

        Raises:
            ValueError: A threshold that is not positive, another metric, or fewer than one row.
            FloatingPointError: The metric is not finite.
        """
        if not (threshold > 0 and math.isfinite(threshold)):
            raise ValueError(message("threshold", "a positive number", threshold, "such as 0.01"))
        check_choice("metric", metric, METRICS)
        check_range("max_rows", max_rows, 1, 1 << 20, "a batch has a row")
        device = self.adapter.device
        clean, corrupted = task.clean.to(device), task.corrupted.to(device)
        base = self.executor.plain(corrupted)
        measure = Metric(metric, self.adapter, task, self.executor.plain(clean).final)
        full = torch.from_numpy(self.graph.full()).to(device)
        state = self.executor.run(full, clean, base)
        found = search(
            state, measure, threshold, rows=max_rows, absolute=absolute, progress=progress
        )
        scores = torch.full(tuple(full.shape), float("nan"))
        for (sender, receiver), effect in found.effects.items():
            scores[sender, receiver] = effect
        provenance = {
            "method": "acdc", "threshold": threshold, "metric": metric, "absolute": absolute,
            "model": type(self.model).__name__, "task": task.meta.get("name"),
            "task_fingerprint": task.fingerprint, "value": found.value, "tested": found.tested,
            "skipped": found.skipped, "batches": found.batches, "rows": found.rows,
        }  # fmt: skip
        return Circuit(self.graph, state.present, scores, provenance)

    @torch.no_grad()
    def eap(self, task: Task, *, metric: str = "logit_diff", ig_steps: int = 0) -> Circuit:
        """Score all edges by gradients: edge attribution patching, or EAP-IG on inputs.

        Args:
            task: Clean and corrupted inputs.
            metric: One of `pahq.METRICS`. KL has no gradient at the clean input: it wants steps.
            ig_steps: Points between corrupted and clean embeddings; 0 for plain EAP, whose cost is
                two runs and one backward pass; each point is a run and a backward pass more.

        Returns:
            All edges, with their scores; `Circuit.top` takes some of them.

        Raises:
            ValueError: Another metric, KL without steps, or fewer than 0 steps.
        """
        check_choice("metric", metric, METRICS)
        check_range("ig_steps", ig_steps, 0, 1 << 20, "0 is plain EAP")
        if metric == "kl" and not ig_steps:
            remedy = "at the clean input its gradient is 0"
            raise ValueError(message("ig_steps", "some steps for kl", ig_steps, remedy))
        device = self.adapter.device
        clean, corrupted = (self.executor.plain(ids.to(device))
                            for ids in (task.clean, task.corrupted))  # fmt: skip
        measure = Metric(metric, self.adapter, task, clean.final)
        scores = edge_scores(self.executor, clean, corrupted, measure, steps=ig_steps)
        provenance = {
            "method": "eap-ig" if ig_steps else "eap", "ig_steps": ig_steps, "metric": metric,
            "model": type(self.model).__name__, "task": task.meta.get("name"),
            "task_fingerprint": task.fingerprint,
        }  # fmt: skip
        return Circuit(self.graph, torch.from_numpy(self.graph.full()), scores, provenance)

    @torch.no_grad()
    def evaluate(
        self, circuit: Circuit, task: Task, metrics: Sequence[str] = ("kl", "logit_diff")
    ) -> dict[str, dict[str, float]]:
        """Return each metric of a circuit, of all edges and of none, and how much it recovers.

        ``recovered`` is ``(m(C) - m(none)) / (m(all) - m(none))``: 1 for a circuit that does what
        the model does, 0 for one that does what no edge does.

        Args:
            circuit: Of this model.
            task: Any, best one that it was not found on.
            metrics: Of `pahq.METRICS`.
        """
        self._same(circuit)
        device = self.adapter.device
        clean = task.clean.to(device)
        base = self.executor.plain(task.corrupted.to(device))
        full = self.executor.plain(clean).final
        own = self.executor.run(circuit.present.to(device), clean, base).final
        found = {}
        for name in metrics:
            values = Metric(name, self.adapter, task, full)(torch.stack([own, full, base.final]))
            mine, whole, none = values.tolist()
            spread = whole - none
            found[name] = {
                "circuit": mine, "all": whole, "none": none,
                "recovered": (mine - none) / spread if spread else float("nan"),
            }  # fmt: skip
        return found

    def _same(self, circuit: Circuit) -> None:
        if circuit.graph != self.graph:
            remedy = "was it found with another model, or with another kv?"
            raise ValueError(message("circuit", f"edges of {self.graph}", circuit.graph, remedy))
