"""Prune scores of auto-circuit."""

import pytest
import torch
from pahq import Circuit, Graph
from pahq.formats import (
    from_auto_circuit,
    load_auto_circuit,
    save_auto_circuit,
    to_auto_circuit,
)

GRAPH = Graph(2, 4, 2)
NAN = float("nan")


def circuit(graph=GRAPH, known=None, **scores):
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    table = torch.full(present.shape, NAN)
    for name, score in scores.items():
        present[graph.edge(name)], table[graph.edge(name)] = True, score
    return Circuit(graph, present, table, known or {})


SOME = {"m0->logits": 1.5, "a0.h3->a1.kv1<k>": -0.25, "input->m1": 0.01, "m0->a1.h2<q>": 3.0}


def test_hooks_and_shapes():
    found = to_auto_circuit(circuit(**SOME))
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "blocks.0.hook_q_input": (4, 1), "blocks.0.hook_k_input": (4, 1),
        "blocks.0.hook_v_input": (4, 1), "blocks.0.hook_mlp_in": (5,),
        "blocks.1.hook_q_input": (4, 6), "blocks.1.hook_k_input": (4, 6),
        "blocks.1.hook_v_input": (4, 6), "blocks.1.hook_mlp_in": (10,),
        "blocks.1.hook_resid_post": (11,),
    }  # fmt: skip
    assert all(values.dtype == torch.float32 for values in found.values())
    # the MLP of a parallel block reads what its heads read
    found = to_auto_circuit(circuit(Graph(1, 2, 2, parallel=True)))
    assert tuple(found["blocks.0.hook_mlp_in"].shape) == (1,)


def test_scores():
    found = to_auto_circuit(circuit(**SOME))
    assert found["blocks.1.hook_resid_post"].nonzero().tolist() == [[5]]
    assert found["blocks.1.hook_resid_post"][5] == 1.5
    # both query heads of the second group, from the fourth head of layer 0
    keys = found["blocks.1.hook_k_input"]
    assert keys.nonzero().tolist() == [[2, 4], [3, 4]]
    assert keys[2, 4] == keys[3, 4] == -0.25
    assert found["blocks.1.hook_q_input"][2, 5] == 3
    # as auto-circuit takes them: those of largest absolute value
    flat = torch.cat([values.flatten() for values in found.values()]).abs()
    assert (flat >= flat.sort(descending=True).values[4]).sum() == 5


@pytest.mark.parametrize("graph", [GRAPH, Graph(2, 3, 3), Graph(2, 4, 2, parallel=True)])
def test_there_and_back(tmp_path, graph):
    draws = torch.Generator().manual_seed(0)
    shape = (graph.senders, graph.receivers)
    made = Circuit(
        graph, torch.rand(shape, generator=draws) < 0.4, torch.randn(shape, generator=draws)
    )
    save_auto_circuit(made, tmp_path / "c")
    found = load_auto_circuit(tmp_path / "c", graph)
    assert found.graph == graph
    assert torch.equal(found.present, made.present)
    assert torch.equal(found.scores[found.present], made.scores[made.present])
    assert found.scores[~found.present].isnan().all()


def test_circuits_without_scores():
    made = circuit(**dict.fromkeys(SOME, NAN))
    found = to_auto_circuit(made)
    assert found["blocks.1.hook_resid_post"][5] == float("inf")
    back = from_auto_circuit(found, GRAPH)
    assert torch.equal(back.present, made.present)
    assert back.scores.isnan().all()
    nothing = from_auto_circuit(to_auto_circuit(circuit()), GRAPH)
    assert len(nothing) == 0


def test_thresholds_of_acdc():
    made = circuit(known={"method": "acdc", "threshold": 0.02}, **SOME)
    found = to_auto_circuit(made, values="pruned_at")
    logits = found["blocks.1.hook_resid_post"]
    assert logits.isinf().nonzero().tolist() == [[5]]
    assert logits[0] == torch.tensor(0.02)
    back = from_auto_circuit(found, GRAPH)
    assert torch.equal(back.present, made.present)
    assert back.scores.isnan().all()
    # of several thresholds: what was not pruned at the given one
    logits[2] = 0.5
    assert set(from_auto_circuit(found, GRAPH, threshold=0.1).edges()) == {
        *made.edges(), "a0.h1->logits",
    }  # fmt: skip
    signed = to_auto_circuit(circuit(**{**SOME, "a1.h0->m1": -2.0}))
    strong = from_auto_circuit(signed, GRAPH, threshold=1)
    assert set(strong.edges()) == {"m0->logits", "m0->a1.h2<q>", "a1.h0->m1"}


def test_what_has_no_rank():
    with pytest.raises(ValueError, match="circuit: expected 5 scores, got int 4"):
        to_auto_circuit(circuit(**{**SOME, "input->m1": NAN}))
    with pytest.raises(ValueError, match="circuit: expected finite scores"):
        to_auto_circuit(circuit(**{**SOME, "input->m1": float("inf")}))
    with pytest.raises(ValueError, match="a threshold in its provenance"):
        to_auto_circuit(circuit(**SOME), values="pruned_at")
    with pytest.raises(ValueError, match="circuit: expected one edge or more, got"):
        to_auto_circuit(circuit(known={"threshold": 0.1}), values="pruned_at")
    with pytest.raises(ValueError, match="values: expected one of score, pruned_at"):
        to_auto_circuit(circuit(**SOME), values="scores")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.update({"blocks.0.hook_attn_in": torch.ones(1)}), "'blocks.0.hook_attn_in'"),
        (lambda d: d.pop("blocks.1.hook_mlp_in"), "a tensor blocks.1.hook_mlp_in"),
        (lambda d: d.update({"blocks.1.hook_mlp_in": torch.ones(3, 10)}), "seq_len=None"),
        (lambda d: d["blocks.1.hook_mlp_in"].fill_(NAN), "blocks.1.hook_mlp_in: expected numbers"),
    ],
)
def test_bad_values(change, expected):
    values = to_auto_circuit(circuit(**SOME))
    change(values)
    with pytest.raises(ValueError, match=expected):
        from_auto_circuit(values, GRAPH)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_auto_circuit(tmp_path / "none", GRAPH)
    torch.save({"a": torch.ones(1)}, tmp_path / "c")
    with pytest.raises(ValueError, match="path: expected a file of safetensors"):
        load_auto_circuit(tmp_path / "c", GRAPH)
    with pytest.raises(ValueError, match="threshold: expected at least 0"):
        from_auto_circuit(to_auto_circuit(circuit(**SOME)), GRAPH, threshold=NAN)
