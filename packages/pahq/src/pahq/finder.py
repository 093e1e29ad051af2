"""From a model and a task to a circuit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message

from pahq.ablation import ABLATIONS, ablated
from pahq.acdc import ORDERS, Acdc, effects
from pahq.adapters import adapter_of
from pahq.attribution import edge_scores
from pahq.batches import Settings, budget_of
from pahq.circuit import Circuit
from pahq.current import Current
from pahq.errors import UnsupportedModelError
from pahq.forward import Executor
from pahq.graph import Graph
from pahq.metrics import Metric, as_metric, metric_name, spread
from pahq.parity import check_model, check_parity
from pahq.precision import PRECISIONS
from pahq.progress import load, save, weights_of
from pahq.ranks import Ranks, alike
from pahq.rounding import ROUNDED, RoundedExecutor
from pahq.whole import Whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from pahq.batches import Search
    from pahq.metrics import CustomMetric
    from pahq.tasks import Task

    MetricLike = str | CustomMetric | Callable[[Tensor], Tensor]


class CircuitFinder:
    """Finds and judges circuits of a model.

    Args:
        model: A causal language model of transformers, of a family in `pahq.adapters.ADAPTERS`.
        kv: ``grouped``: query heads that share keys and values share their receivers, as in the
            model; ``per_query_head``: each has its own, as in TransformerLens.
        check: Whether to compare with the model's own logits first.
        offload: ``none``, or ``cpu``: the matrices of the model's layers stay in the host's memory,
            and are copied to the device a layer at a time, the next one while one is used. The
            finder has the model until `close`; it can be called meanwhile.
        device: For computation with offloading; a GPU by default, if there is one.

    Raises:
        UnsupportedModelError: Another family, a model whose dropout is on, or one whose logits are
            not reproduced.
    """

    def __init__(
        self,
        model: Any,
        *,
        kv: str = "grouped",
        check: bool = True,
        offload: str = "none",
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("kv", kv, ("grouped", "per_query_head"))
        check_choice("offload", offload, ("none", "cpu"))
        if device is not None and offload == "none":
            raise ValueError(message("device", "none without offload", device, "move the model"))
        self.model, self.adapter = model, adapter_of(model)
        check_model(model)
        heads = self.adapter.heads
        self.graph = Graph(
            self.adapter.layers, heads, self.adapter.key_heads if kv == "grouped" else heads,
            self.adapter.parallel,
        )  # fmt: skip
        self.executor = Executor(self.adapter, self.graph)
        self._weights: str | None = None
        if offload == "cpu":
            self._weights = weights_of(model)
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.adapter.stream(device)
        if check:
            check_parity(model, self.executor)

    def close(self) -> None:
        """Give an offloaded model its weights back; the finder is of no use afterwards."""
        if self.adapter.streamer is not None:
            self.adapter.streamer.close()

    # --- runs --------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, circuit: Circuit, clean: Tensor, corrupted: Tensor, *, ablation: str = "patch"
    ) -> Tensor:
        """Return logits ``(N, T, V)`` of a run on clean ids in which a circuit's edges are.

        Args:
            circuit: All other edges carry what they carry on the corrupted ids.
            clean: int64 ``(N, T)``.
            corrupted: int64 ``(N, T)``.
            ablation: What absent edges carry, one of `pahq.ABLATIONS`: see `pahq.ablation.ablated`.

        Raises:
            ValueError: Ids of different shape, or a circuit of another model.
        """
        self._same(circuit)
        check_choice("ablation", ablation, ABLATIONS)
        if clean.ndim != 2 or clean.shape != corrupted.shape:
            remedy = "clean and corrupted prompts must have as many tokens, one by one"
            shape = tuple(corrupted.shape)
            raise ValueError(message("corrupted", f"shape {tuple(clean.shape)}", shape, remedy))
        device = self.adapter.device
        base = self.executor.plain(corrupted.to(device))
        every = torch.full((len(clean),), clean.shape[1] - 1)
        base = ablated(self.executor, base, ablation, every)
        state = self.executor.run(circuit.present, clean.to(device), base)
        return self.adapter.logits(state.final)

    def acdc(
        self,
        task: Task,
        threshold: float,
        *,
        metric: MetricLike = "kl",
        absolute: bool = False,
        ablation: str = "patch",
        direct_edges: bool = False,
        order: str = "acdc",
        seed: int = 0,
        expect: Circuit | None = None,
        precision: str = "auto",
        max_rows: int = 64,
        memory_budget: int | None = None,
        resume_from: str | Path | None = None,
        progress: bool = True,
    ) -> Circuit:
        """Find a circuit by ACDC: remove every edge that the metric does not miss.

        The edges are those that the sequential algorithm keeps (Conmy et al., arXiv:2304.14997).

        Args:
            task: Clean and corrupted inputs.
            threshold: By how much a removal must raise the metric for the edge to stay, tau.
            metric: One of `pahq.METRICS`, or a `CustomMetric`.
            absolute: Whether an edge that lowers the metric by so much stays, too.
            ablation: What removed edges carry, one of `pahq.ABLATIONS`: see
                `pahq.ablation.ablated`.
            direct_edges: Whether all edges into a head's query, key or value are tried at once
                first, as the direct edges of the authors' code do.
            order: Of the edges into a receiver: ``acdc`` tries those from the nearest senders
                first, ``reverse`` those from the farthest, ``shuffle`` any first.
            seed: Of shuffling.
            expect: Edges that are expected to stay, as those with high scores by gradients or a
                circuit of another threshold: right guesses spare batches, wrong ones change
                nothing but the time.
            precision: In how many bits differences from the circuit so far are held and multiplied:
                ``fp32``, ``bf16-delta``, ``fp8-delta``; ``auto`` is ``bf16-delta`` on a GPU, else
                ``fp32``, as with a metric without a gradient. Where rounding could turn a decision,
                it is made again in float32. ``fp8-rtn`` and ``rtn-q`` round activations as
                published (`pahq.rounding`): they find other circuits and take longer, and are there
                to be measured.
            max_rows: Removals that are tried in one batch; fewer where they do not fit into memory.
            memory_budget: Bytes that the rows of a batch may take; half of what is free on the GPU
                by default, 2 GiB on a CPU.
            resume_from: A folder where the search is written down after every layer, and from where
                it goes on if it was stopped. A metric of one's own is known by its name only.
            progress: Whether to show a bar.

        Raises:
            ValueError: A threshold that is not positive, another metric, fewer than one row, or few
                bits for a metric without a gradient.
            ResumeError: The folder has a search with another model, task or setting, or a damaged
                one.
            UnsupportedModelError: A precision of differences, and heads of a layer share a norm.
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one removal fits into memory.
        """
        from tqdm.auto import tqdm

        if not (threshold > 0 and math.isfinite(threshold)):
            raise ValueError(message("threshold", "a positive number", threshold, "such as 0.01"))
        check_choice("order", order, ORDERS)
        metric = as_metric(metric)
        if expect is not None:
            self._same(expect, "expect")
        batches = self._settings(precision, max_rows, memory_budget)
        current, measure = self._begin(task, metric, ablation, batches.precision)
        low = batches.precision in PRECISIONS and PRECISIONS[batches.precision].doubt
        if low and measure.slopes(torch.zeros_like(measure.clean)) is None:
            # how far rounding is off is judged by its gradient
            if precision != "auto":
                remedy = f"{metric_name(metric)} has no gradient"
                raise ValueError(message("precision", "fp32 or auto", precision, remedy))
            batches.precision = "fp32"
        settings = {
            "threshold": threshold, "metric": metric_name(metric), "absolute": absolute,
            "ablation": ablation,
            "direct_edges": direct_edges, "order": order, "seed": seed if order == "shuffle" else 0,
            **self._of(task),
        }  # fmt: skip
        if batches.precision in ROUNDED:
            settings["rounding"] = batches.precision
        ranks = Ranks()
        alike(ranks, settings)
        progress = progress and not ranks.index
        with tqdm(total=self.graph.edges, desc="acdc", unit="edge", disable=not progress) as bar:
            expected = None if expect is None else expect.present
            search = Acdc(
                current, measure, threshold, batches, absolute=absolute, direct=direct_edges,
                order=order, seed=seed, expected=expected, bar=bar,
            )  # fmt: skip
            done = None
            if resume_from is not None:
                done = load(Path(resume_from), search, settings)
                bar.update(search.found.tested + search.found.skipped)
            for layer in reversed(range(self.graph.layers + 1 if done is None else done)):
                search.layer(layer)
                if resume_from is not None and not ranks.index:
                    save(Path(resume_from), search, layer, settings)
        found = search.found
        names = self.graph.receiver_names
        provenance = {
            "method": "acdc", **settings, "value": found.value, "tested": found.tested,
            "skipped": found.skipped, "batches": found.batches, "rows": found.rows,
            "precision": batches.precision, "checked": found.checked,
            "direct_effects": {names[r]: effect for r, effect in found.direct.items()},
        }  # fmt: skip
        return Circuit(self.graph, current.present, self._scores(found), provenance)

    def edge_effects(
        self,
        task: Task,
        edges: Iterable[str] | None = None,
        *,
        metric: MetricLike = "kl",
        ablation: str = "patch",
        max_rows: int = 64,
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> Circuit:
        """Measure what the removal of each edge alone adds to a metric, all others being there.

        Args:
            task: Clean and corrupted inputs.
            edges: Their names; all by default.
            metric: One of `pahq.METRICS`, or a `CustomMetric`.
            ablation: What removed edges carry, one of `pahq.ABLATIONS`.
            max_rows: Removals in one batch; fewer where they do not fit into memory.
            memory_budget: Of `acdc`.
            progress: Whether to show a bar.

        Returns:
            These edges, with their effects as scores.

        Raises:
            ValueError: An edge that there is not, another metric, or fewer than one row.
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one removal fits into memory.
        """
        from tqdm.auto import tqdm

        wanted = torch.from_numpy(self.graph.full())
        if edges is not None:
            wanted = torch.zeros_like(wanted)
            for name in edges:
                wanted[self.graph.edge(name)] = True
        metric = as_metric(metric)
        batches = self._settings("fp32", max_rows, memory_budget)
        current, measure = self._begin(task, metric, ablation)
        total = int(wanted.sum())
        ranks = Ranks()
        alike(ranks, {**self._of(task), "metric": metric_name(metric), "ablation": ablation})
        progress = progress and not ranks.index
        with tqdm(total=total, desc="effects", unit="edge", disable=not progress) as bar:
            found = effects(current, measure, wanted, batches, bar=bar)
        provenance = {
            "method": "exact", "metric": metric_name(metric), "ablation": ablation,
            "batches": found.batches, **self._of(task),
        }  # fmt: skip
        return Circuit(self.graph, wanted, self._scores(found), provenance)

    def _settings(self, precision: str, rows: int, budget: int | None) -> Settings:
        """Return how batches are run."""
        check_choice("precision", precision, ("auto", *PRECISIONS, *ROUNDED))
        check_range("max_rows", rows, 1, 1 << 20, "a batch has a row")
        device = self.adapter.device
        if precision == "auto":
            low = device.type == "cuda" and self.adapter.dtype == torch.float32
            precision = "bf16-delta" if low and not self.adapter.shared_scale else "fp32"
        elif self.adapter.shared_scale and PRECISIONS.get(precision, PRECISIONS["fp32"]).held:
            raise UnsupportedModelError(
                f"precision: expected fp32 for {type(self.model).__name__}, got {precision!r}; all "
                "heads of a layer share a norm, so that every run is of the whole model"
            )
        if budget is None:
            budget = budget_of(device)
        check_range("memory_budget", budget, 1, 1 << 50, "bytes")
        return Settings(rows, precision, Ranks().least(budget))

    @torch.no_grad()
    def _begin(
        self, task: Task, metric: str | CustomMetric, ablation: str, precision: str = "fp32"
    ) -> tuple[Current | Whole, Metric]:
        """Return the run of all edges, and what it is judged by."""
        check_choice("ablation", ablation, ABLATIONS)
        executor = self.executor
        if precision in ROUNDED:
            executor = RoundedExecutor(self.adapter, self.graph, precision)
        device = self.adapter.device
        base = executor.plain(task.corrupted.to(device))
        whole = precision in ROUNDED or self.adapter.shared_scale
        base = ablated(executor, base, ablation, task.positions).park(streams=not whole)
        clean = executor.plain(task.clean.to(device))
        measure = Metric(metric, self.adapter, task, clean.final)
        if whole:
            return Whole(executor, clean, base), measure
        # what is on the GPU goes before the same is there as differences
        clean = clean.park(streams=True)
        return Current(executor, clean, base, task.positions), measure

    def _of(self, task: Task) -> dict[str, Any]:
        """Return what a result depends on beside its settings."""
        return {
            "model": type(self.model).__name__, "weights": self._weights or weights_of(self.model),
            "task": task.meta.get("name"), "task_fingerprint": task.fingerprint,
            "d_model": int(self.model.config.get_text_config().hidden_size),
        }  # fmt: skip

    def _scores(self, found: Search) -> Tensor:
        scores = torch.full((self.graph.senders, self.graph.receivers), float("nan"))
        for edge, effect in found.effects.items():
            scores[edge] = effect
        return scores

    @torch.no_grad()
    def eap(self, task: Task, *, metric: MetricLike = "logit_diff", ig_steps: int = 0) -> Circuit:
        """Score all edges by gradients: edge attribution patching, or EAP-IG on inputs.

        Args:
            task: Clean and corrupted inputs.
            metric: One of `pahq.METRICS`, or a `CustomMetric`. KL has no gradient at the clean
                input: it wants steps.
            ig_steps: Points between corrupted and clean embeddings; 0 for plain EAP, whose cost is
                two runs and one backward pass; each point is a run and a backward pass more.

        Returns:
            All edges, with their scores; `Circuit.top` takes some of them.

        Raises:
            ValueError: Another metric, KL without steps, or fewer than 0 steps.
        """
        metric = as_metric(metric)
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
            "method": "eap-ig" if ig_steps else "eap", "ig_steps": ig_steps,
            "metric": metric_name(metric), **self._of(task),
        }  # fmt: skip
        return Circuit(self.graph, torch.from_numpy(self.graph.full()), scores, provenance)

    @torch.no_grad()
    def evaluate(
        self,
        circuit: Circuit,
        task: Task,
        metrics: Sequence[MetricLike] = ("kl", "logit_diff"),
        *,
        ablation: str = "patch",
    ) -> dict[str, dict[str, float]]:
        """Return each metric of a circuit, of all edges and of none, and how much it recovers.

        ``recovered`` is ``(m(C) - m(none)) / (m(all) - m(none))``: 1 for a circuit that does what
        the model does, 0 for one that does what no edge does.

        Args:
            circuit: Of this model.
            task: Any, best one that it was not found on.
            metrics: Of `pahq.METRICS`, or a `CustomMetric`.
            ablation: What absent edges carry, one of `pahq.ABLATIONS`.
        """
        self._same(circuit)
        check_choice("ablation", ablation, ABLATIONS)
        device = self.adapter.device
        clean = task.clean.to(device)
        base = self.executor.plain(task.corrupted.to(device))
        base = ablated(self.executor, base, ablation, task.positions)
        full = self.executor.plain(clean).final
        own = self.executor.run(circuit.present, clean, base).final
        found = {}
        for metric in map(as_metric, metrics):
            values = Metric(metric, self.adapter, task, full)(torch.stack([own, full, base.final]))
            mine, whole, none = values.tolist()
            apart = spread(whole, none, self.adapter.dtype)
            found[metric_name(metric)] = {
                "circuit": mine, "all": whole, "none": none,
                "recovered": (mine - none) / apart if apart else float("nan"),
            }  # fmt: skip
        return found

    def _same(self, circuit: Circuit, name: str = "circuit") -> None:
        if circuit.graph != self.graph:
            remedy = "was it found with another model, or with another kv?"
            raise ValueError(message(name, f"edges of {self.graph}", circuit.graph, remedy))
