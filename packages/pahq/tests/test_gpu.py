"""Searches on a GPU, against the same on a CPU in float64."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder, CustomMetric, tasks
from pahq.metrics import Metric

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import family, lively, pairs

pytestmark = pytest.mark.gpu
TAU = 2e-3


def decided_alike(found, wanted, threshold=TAU):
    """All decisions are the same up to one on the very threshold, and in float32 the effects."""
    differ = (found.present != wanted.present).nonzero().tolist()
    margins = (wanted.scores - threshold).abs()
    assert not differ or float(margins[tuple(differ[0])]) < 1e-6, differ[:3]
    if not differ and found.provenance["precision"] == "fp32":
        torch.testing.assert_close(
            found.scores, wanted.scores, rtol=1e-2, atol=1e-5, equal_nan=True, check_dtype=False
        )


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_models_whose_heads_share_a_norm(name, cuda):
    task = pairs()
    exact, finder = CircuitFinder(family(name)), CircuitFinder(family(name).float().to(cuda))
    for direct in (False, True):
        options = {"direct_edges": direct, "progress": False}
        wanted = exact.acdc(task, TAU, **options)
        decided_alike(finder.acdc(task, TAU, **options), wanted)
    torch.testing.assert_close(
        finder.edge_effects(task, progress=False).scores,
        exact.edge_effects(task, progress=False).scores,
        rtol=1e-2, atol=1e-6, equal_nan=True, check_dtype=False,
    )  # fmt: skip


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "nll", "custom"])
def test_metrics(metric, cuda):
    if metric == "custom":
        metric = CustomMetric(lambda logits: -logits.std(-1).mean(-1), "spread")
    task = pairs()
    exact, finder = CircuitFinder(lively("llama")), CircuitFinder(lively("llama").float().to(cuda))
    options = {"metric": metric, "absolute": True, "progress": False}
    wanted = exact.acdc(task, TAU, **options)
    assert 0 < int(wanted.present.sum()) < exact.graph.edges
    for precision in ("fp32", "bf16-delta", "fp8-delta"):
        decided_alike(finder.acdc(task, TAU, precision=precision, **options), wanted)


def test_a_metric_without_a_gradient_is_taken_in_float32(cuda):
    metric = CustomMetric(lambda logits: -(logits.argmax(-1) == 7).float().mean(-1), "argmax")
    finder = CircuitFinder(lively("llama").float().to(cuda))
    found = finder.acdc(pairs(), 0.1, metric=metric, progress=False)
    assert found.provenance["precision"] == "fp32"


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean_positional"])
def test_ablations(ablation, cuda):
    task = pairs()
    exact, finder = CircuitFinder(lively("gpt2")), CircuitFinder(lively("gpt2").float().to(cuda))
    options = {"ablation": ablation, "direct_edges": True, "progress": False}
    wanted = exact.acdc(task, TAU, **options)
    for precision in ("fp32", "bf16-delta"):
        decided_alike(finder.acdc(task, TAU, precision=precision, **options), wanted)


def test_memory_that_runs_out_while_a_batch_is_recorded(cuda, caplog):
    finder, task = CircuitFinder(lively("llama").float().to(cuda)), pairs(512, 64)
    for _ in range(2):  # the first also takes what stays: workspaces of products
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        wanted = finder.acdc(task, TAU, progress=False)
        needed = torch.cuda.max_memory_reserved() - before
    gc.collect()
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + 3 * needed // 4
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(most / total)
    try:
        found = finder.acdc(task, TAU, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with" in caplog.text
    assert torch.equal(found.present, wanted.present)
    assert found.provenance["batches"] > wanted.provenance["batches"]


def test_searches_leave_no_memory_behind(cuda):
    """Streams of their own would keep a workspace for products each."""
    finder, task = CircuitFinder(lively("llama").float().to(cuda)), pairs()
    held = []
    for _ in range(3):
        finder.acdc(task, TAU, progress=False)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]


def test_a_model_as_it_ships(cuda):
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval().to(cuda)
    task = tasks.ioi(AutoTokenizer.from_pretrained(smollm2()), 8)
    finder = CircuitFinder(model)
    graph, executor = finder.graph, finder.executor
    # all edges into a query, key or value at once, first
    found = finder.acdc(task, 0.05, direct_edges=True, progress=False)
    exact = finder.acdc(task, 0.05, direct_edges=True, precision="fp32", progress=False)
    decided_alike(found, exact, 0.05)
    assert 0 < int(found.present.sum()) < 1000
    # the circuit, and removals of single edges, as whole runs
    base = executor.plain(task.corrupted.to(cuda))
    measure = Metric("kl", finder.adapter, task, executor.plain(task.clean.to(cuda)).final)

    @torch.no_grad()
    def value(present):
        return float(measure(executor.run(present, task.clean.to(cuda), base).final[None])[0])

    assert value(found.present) == pytest.approx(found.provenance["value"], abs=1e-5)
    effects = finder.edge_effects(task, progress=False).scores
    assert int((~effects.isnan()).sum()) == graph.edges
    full = torch.from_numpy(graph.full())
    draws = torch.Generator().manual_seed(0)
    largest = effects.nan_to_num(-1).flatten().topk(20).indices
    edges = full.nonzero()[torch.randint(graph.edges, (30,), generator=draws)].tolist()
    edges += [divmod(int(place), graph.receivers) for place in largest]
    for edge in edges:
        present = full.clone()
        present[tuple(edge)] = False
        assert float(effects[tuple(edge)]) == pytest.approx(value(present), rel=5e-3, abs=2e-6)
