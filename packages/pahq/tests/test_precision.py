"""Differences in few bits: how far they are off, and that no decision is."""

import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder, CustomMetric
from pahq import precision as module
from pahq.acdc import Acdc, _Last
from pahq.batches import Search, Settings
from pahq.precision import PRECISIONS, Precision
from pahq.rows import Rows
from pahq.suffix import Suffix

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import lively, pairs

LOW = ["bf16-delta", "fp8-delta"]


def single(name, **options):
    """A finder of a small model in float32."""
    return CircuitFinder(lively(name, **options).float())


def removed(finder, task, precision, *, share=1.0, receiver="a0.kv0<v>"):
    """How the final states change without some share of what embeddings give to a receiver."""
    current, measure = finder._begin(task, "kl", "patch")
    for r in finder.graph.order():
        current.close(r)
    number = finder.graph.receiver_names.index(receiver)
    suffix = Suffix(current, [number])
    rows = Rows(current, measure, Settings(precision=precision), Acdc(current, measure, 1.0).found)
    gone = -share * current.gone([0], current.need(number))[0]
    given = rows.changes({number: gone[None]}, rows.low)
    return suffix.run(given, 1, rows.low, rows.weights, 1 << 30)[0].double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize(("precision", "most"), [("bf16-delta", 0.01), ("fp8-delta", 0.1)])
def test_errors_are_a_share_of_the_change(name, precision, most):
    """Rounded activations would err as much for a change a thousand times less."""
    task, receiver = pairs(n=4), "a0.h0<v>" if name in ("gpt2", "gpt_neox") else "a0.kv0<v>"
    receiver = receiver if receiver in CircuitFinder(lively(name)).graph.receiver_names else "m0"
    for share in (1.0, 1e-3):
        exact = removed(CircuitFinder(lively(name)), task, "fp32", share=share, receiver=receiver)
        found = removed(single(name), task, precision, share=share, receiver=receiver)
        error = float((found - exact).norm() / exact.norm())
        assert 1e-4 < error < most
        held = removed(single(name), task, "fp32", share=share, receiver=receiver)
        assert float((held - exact).norm() / exact.norm()) < most / 10


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("name", "kv"), [
    ("llama", "grouped"), ("qwen3", "per_query_head"), ("gpt2", "grouped"), ("gpt_neox", "grouped"),
])  # fmt: skip
def test_decisions_are_those_of_float32(name, kv, precision):
    finder, task = CircuitFinder(lively(name).float(), kv=kv), pairs()
    kept = set()
    for metric, threshold, absolute, direct in (
        ("kl", 1e-4, False, False), ("kl", 2e-3, False, True), ("logit_diff", 1e-2, True, False),
    ):  # fmt: skip
        options = {"metric": metric, "absolute": absolute, "direct_edges": direct}
        found, wanted = (
            finder.acdc(task, threshold, precision=p, max_rows=16, progress=False, **options)
            for p in (precision, "fp32")
        )
        assert torch.equal(found.present, wanted.present)
        value = wanted.provenance["value"]
        assert found.provenance["value"] == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert found.provenance["precision"] == precision
        assert 0 <= found.provenance["checked"] < found.provenance["tested"]
        kept.add(len(found))
    assert len(kept) == 3


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "nll", "spread"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_cancels_in_a_metric_does_not_in_its_doubt(name, metric):
    """Changes of examples, or of logits, may cancel; what rounding makes of them does not."""
    if metric == "spread":
        metric = CustomMetric(lambda logits: -logits.std(-1).mean(-1), "spread")
    finder, kept = single(name), []
    threshold = 1e-4 if metric == "prob_diff" else 2e-3
    for seed in (0, 3):
        task = pairs(seed=seed)
        options = {"metric": metric, "absolute": True, "max_rows": 16, "progress": False}
        wanted = finder.acdc(task, threshold, precision="fp32", **options)
        for precision in LOW:
            found = finder.acdc(task, threshold, precision=precision, **options)
            assert torch.equal(found.present, wanted.present)
        kept.append(len(wanted))
    assert 0 < min(kept) < finder.graph.edges


def test_a_metric_without_a_gradient():
    def right(logits):
        return -(logits.argmax(-1) == torch.arange(5, 8)).double().mean(-1)

    finder, task = single("llama"), pairs()
    found = finder.acdc(task, 0.1, metric=right, precision="auto", progress=False)
    assert found.provenance["precision"] == "fp32"
    with pytest.raises(ValueError, match=r"precision: expected fp32 or auto, .*right has no grad"):
        finder.acdc(task, 0.1, metric=right, precision="bf16-delta", progress=False)


def flips(finder, task, threshold, precision, monkeypatch, doubt):
    kind = PRECISIONS[precision]
    changed = {**PRECISIONS, precision: Precision(kind.held, kind.multiplied, doubt)}
    monkeypatch.setattr("pahq.rows.PRECISIONS", changed)
    found = finder.acdc(task, threshold, precision=precision, progress=False)
    monkeypatch.undo()
    return found


def test_close_decisions_are_made_again(monkeypatch):
    """With the threshold put where an edge is, rounding alone would decide."""
    finder, task = single("llama"), pairs()
    effects = finder.acdc(task, 2e-3, precision="fp32", progress=False).scores
    near = sorted(x for x in effects[~effects.isnan()].tolist() if 1e-4 < x < 1e-2)
    differ = checked = 0
    for effect in near[:: max(1, len(near) // 12)]:
        # as close as float32 can tell for sure
        for threshold in (effect * (1 - 1e-4), effect * (1 + 1e-4)):
            wanted = finder.acdc(task, threshold, precision="fp32", progress=False)
            for rows in (64, 1):
                found = finder.acdc(
                    task, threshold, precision="fp8-delta", max_rows=rows, progress=False
                )
                assert torch.equal(found.present, wanted.present)
                checked += found.provenance["checked"]
            rough = flips(finder, task, threshold, "fp8-delta", monkeypatch, 0.0)
            assert rough.provenance["checked"] == 0
            differ += not torch.equal(rough.present, wanted.present)
    assert checked > 0
    assert differ > 0


def test_doubt_of_both_values_counts():
    """An effect is a difference: what the last value may be off by counts, in every batch."""
    search = object.__new__(Acdc)
    search.absolute, search.threshold, search.found = False, 0.1, Search()
    asked = []

    def check(places):
        asked.append(places)
        return [0.2] * len(places)

    # two batches of two rows, of effects 0.05 and 0.05, each 0.03 from what is not sure
    last = _Last(0.0)
    for values, wanted in (([0.05, 0.10], []), ([0.15, 0.20], [])):
        kept, effects = search._decide((values, [0.02, 0.02]), [False, False], last, check)
        assert (kept, asked) == ([False, False], wanted)
        assert effects == pytest.approx([0.05, 0.05])
    # with a doubt of 0.03 the two together reach the threshold, in the first row, too
    last.doubt = 0.03
    kept, effects = search._decide(([0.25], [0.03]), [False], last, check)
    assert (kept, effects, asked) == ([True], [0.2], [[0]])
    assert (last.value, last.doubt) == (0.20, 0.03)
    # and what is removed leaves its doubt behind
    search._decide(([0.21], [0.025]), [False], last, check)
    assert (last.value, last.doubt) == (0.21, 0.025)


def test_what_is_multiplied_has_few_bits(monkeypatch):
    """Operands of products, not only their values, are of the precision that is named."""
    task, seen = pairs(), {}
    plain = module.delta_linear

    def looks(delta, weight, **options):
        seen.setdefault(str(delta.dtype), []).append(weight.dtype == delta.dtype)
        return plain(delta, weight, **options)

    monkeypatch.setattr(module, "delta_linear", looks)
    for precision, dtype in (("bf16-delta", "bfloat16"), ("fp8-delta", "float8_e4m3fn")):
        seen.clear()
        found = single("llama").acdc(task, 2e-3, precision=precision, progress=False)
        assert all(all(same) for same in seen.values())
        # float32 is left to the head in question, and to the current run
        assert len(seen[f"torch.{dtype}"]) > found.provenance["batches"] / 4


def test_float32_is_the_default_on_a_cpu():
    found = single("llama").acdc(pairs(), 2e-3, progress=False)
    assert found.provenance["precision"] == "fp32"
    assert found.provenance["checked"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_decisions_on_a_gpu(name, cuda):
    task = pairs()
    wanted = CircuitFinder(lively(name)).acdc(task, 2e-3, progress=False)
    finder = CircuitFinder(lively(name).float().to(cuda))
    margins = (wanted.scores - 2e-3).abs()
    for precision in ("fp32", *LOW):
        found = finder.acdc(task, 2e-3, precision=precision, progress=False)
        differ = (found.present != wanted.present).nonzero().tolist()
        assert not differ or float(margins[tuple(differ[0])]) < 1e-6
        assert found.provenance["precision"] == precision
    assert finder.acdc(task, 2e-3, progress=False).provenance["precision"] == "bf16-delta"
