"""Gates: what ACDC keeps of two parents."""

import pytest
import torch
from pahq import CircuitFinder, Graph
from pahq.truth import BAND, gate

MODELS = [
    ("gpt2", Graph(1, 2, 2)), ("gpt2", Graph(2, 4, 4)),
    ("llama", Graph(2, 4, 2)), ("llama", Graph(2, 2, 1)),
]  # fmt: skip
THRESHOLDS = (BAND[0], 1e-2)


def found(made, threshold, **options):
    finder = CircuitFinder(made.model)
    return [*finder.acdc(made.task(8), threshold, progress=False, **options).edges()]


@pytest.mark.parametrize(("family", "graph"), MODELS)
def test_both_parents_of_and(family, graph):
    made = gate("and", family=family, graph=graph)
    for threshold in THRESHOLDS:
        assert found(made, threshold) == [*made.circuit.edges()]


@pytest.mark.parametrize(("family", "graph"), MODELS)
def test_one_parent_of_or(family, graph):
    made = gate("or", family=family, graph=graph)
    first, last = ([*branch.edges()] for branch in made.branches)
    for threshold in THRESHOLDS:
        # the last head is tried first, and goes while the first is there; or the other way round
        assert found(made, threshold) == first
        assert found(made, threshold, order="reverse") == last


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["and", "or"])
def test_truth_tables(kind, family):
    """The logits with each parent clean or corrupted: those of 1, or those of 0."""
    made = gate(kind, family=family, graph=Graph(2, 4, 4), dtype=torch.float64)
    finder, task = CircuitFinder(made.model), made.task(4)
    a, b = made.branches
    one, zero = (
        finder.run(c, task.clean, task.corrupted)[:, -1] for c in (made.circuit, a & b - a)
    )
    assert float((one - zero).abs().max()) > 1
    for branch in (a, b):
        half = finder.run(branch, task.clean, task.corrupted)[:, -1]
        torch.testing.assert_close(half, one if kind == "or" else zero, rtol=0, atol=1e-3)
    with torch.no_grad():
        for ids, wanted in ((task.clean, one), (task.corrupted, zero)):
            logits = made.model(input_ids=ids, use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-3)


def test_what_it_says_of_itself():
    made = gate("or")
    assert made.kind == "or"
    assert sorted(made.circuit.edges()) == [
        "a0.h0->m0", "a0.h1->m0", "input->a0.h0<v>", "input->a0.h1<v>", "m0->logits",
    ]  # fmt: skip
    first, last = made.branches
    assert [*(first & last).edges()] == ["m0->logits"]
    assert sorted((first | last).edges()) == sorted(made.circuit.edges())
    assert not set(made.clean.tolist()) & set(made.corrupted.tolist())


def test_bad_input():
    with pytest.raises(ValueError, match="kind: expected one of and, or"):
        gate("xor")
    with pytest.raises(ValueError, match="graph: expected two heads or more"):
        gate("and", graph=Graph(1, 1, 1))
