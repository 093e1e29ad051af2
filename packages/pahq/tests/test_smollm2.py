"""Tasks and circuits on a model that does them."""

import pytest
import torch
from pahq import CircuitFinder, Task, tasks
from pahq.acdc import Acdc
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


@pytest.mark.parametrize("order", ["ABB", "BAB"])
def test_the_model_identifies_the_indirect_object(model, tokenizer, order):
    task = tasks.ioi(tokenizer, 32, order=order)
    assert task.clean.shape == (32, 14)
    assert (task.positions == 13).all()
    rows = torch.arange(32)
    with torch.no_grad():
        scores = model(task.clean).logits[rows, task.positions]
        blind = model(task.corrupted).logits[rows, task.positions]
    right, wrong = scores[rows, task.answers], scores[rows, task.wrong_answers]
    assert float((right > wrong).double().mean()) == 1
    assert float((scores.argmax(-1) == task.answers).double().mean()) > 0.85
    assert abs(float((blind[rows, task.answers] - blind[rows, task.wrong_answers]).mean())) < 2
    # who is named in one is not named in the other
    for a, b in zip(task.meta["clean"], task.meta["corrupted"], strict=True):
        assert a.split()[1] not in b
    assert tasks.ioi(tokenizer, 4, seed=1).fingerprint != tasks.ioi(tokenizer, 4).fingerprint
    assert tasks.ioi(tokenizer, 4).fingerprint == tasks.ioi(tokenizer, 4).fingerprint


def test_pairs(tokenizer):
    clean = ["The capital of France is", "The capital of the country Japan is"]
    corrupted = ["The capital of Spain is", "The capital of the country Italy is"]
    task = tasks.from_pairs(tokenizer, clean, corrupted, [" Paris", " Tokyo"], [" Madrid", " Rome"])
    assert task.positions.tolist() == [4, 6]
    assert tokenizer.decode(task.answers[0]) == " Paris"
    assert tokenizer.decode(task.clean[0, :5]) == clean[0]
    assert len(task.select([1])) == 1
    with pytest.raises(ValueError, match=r"as many tokens as in the clean prompt, got 6 and 5"):
        tasks.from_pairs(tokenizer, clean[:1], ["The capital of the Spain is"], [" Paris"])
    with pytest.raises(ValueError, match="other tokens than the answers"):
        tasks.from_pairs(tokenizer, clean[:1], corrupted[:1], [" Paris"], [" Paris"])
    with pytest.raises(ValueError, match="answers: expected 1 texts"):
        tasks.from_pairs(tokenizer, clean[:1], corrupted[:1], [" Paris", " Rome"])
    with pytest.raises(ValueError, match="clean: expected token ids"):
        tasks.from_pairs(tokenizer, [], [], [])
    with pytest.raises(ValueError, match="a token of its own behind the prompt"):
        tasks.from_pairs(tokenizer, ["The capit"], ["The capit"], ["al of"])
    with pytest.raises(ValueError, match="n: expected at least 1"):
        tasks.ioi(tokenizer, 0)
    with pytest.raises(ValueError, match="order: expected one of"):
        tasks.ioi(tokenizer, order="AAB")
    with pytest.raises(ValueError, match=r"corrupted: expected shape \(2, 3\)"):
        Task(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))


@pytest.mark.slow
def test_the_last_layer_of_a_circuit(model, tokenizer):
    """Decisions about the logits and the last MLP, against whole runs one edge at a time."""
    task, finder = tasks.ioi(tokenizer, 2), CircuitFinder(model)
    assert finder.graph.edges == 70_651
    order = [*finder.graph.order()][:2]
    current, measure = finder._begin(task, "kl", "patch")
    search = Acdc(current, measure, 0.01)
    for receiver in order:
        search._receiver(receiver)
    graph, executor = finder.graph, finder.executor
    base = executor.plain(task.corrupted)
    whole = executor.plain(task.clean).final
    law = finder.adapter.logits(whole[:, -1]).log_softmax(-1).double()
    last = executor.run(torch.from_numpy(graph.full()), task.clean, base)
    # all that comes before these two receivers is as on the clean input
    present, now = torch.from_numpy(graph.full()), 0.0
    senders = last.senders.clone()
    for receiver in order:
        for sender in graph.candidates(receiver):
            if receiver != graph.logits and not present[graph.mlp(29), graph.logits]:
                present[sender, receiver] = False
                continue
            present[sender, receiver] = False
            values = senders - base.senders
            column = graph.columns(29, "mlp").start
            seen = present[: graph.upstream(column), column].float()
            x = base.mlp[29] + torch.einsum("s,sntd->ntd", seen, values[: len(seen)])
            with torch.no_grad():
                values[graph.mlp(29)] = finder.adapter.mlp(29, x) - base.senders[graph.mlp(29)]
                x = base.final + torch.einsum(
                    "s,sntd->ntd", present[:, graph.logits].float(), values
                )
                also = finder.adapter.logits(x[:, -1]).log_softmax(-1).double()
            after = float((law.exp() * (law - also)).sum(-1).mean())
            if after - now < 0.01:
                now = after
            else:
                present[sender, receiver] = True
    assert torch.equal(current.present[:, order], present[:, order])
    assert 5 < int(present[:, order].sum()) < 200
    assert search.found.batches < search.found.tested / 3
