"""How well a model does a task, against its whole logits."""

import math

import pytest
import torch
from pahq import Task
from pahq.tasks import baseline
from shared_kernels.testing.models import tiny_model

SETS = torch.tensor([[5, -1], [6, 7], [8, -1], [9, 10], [11, -1]])
WRONG = torch.tensor([[15, 16, 17], [18, -1, -1], [19, 20, -1], [21, -1, -1], [22, 23, 24]])


def make_task(wrong=True):
    draws = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(3, 96, (2, 5, 9), generator=draws)
    return Task(clean, corrupted, torch.tensor([8, 3, 8, 5, 0]), SETS, WRONG if wrong else None,
                {"name": "some", "clean": list("abcde")})  # fmt: skip


def literally(model, task):
    """Loops over examples and tokens, in float64."""
    with torch.no_grad():
        logits = model(input_ids=task.clean).logits.double()
    found = []
    for row in range(len(task)):
        x = logits[row, task.positions[row]]
        law = x.exp() / x.exp().sum()
        right, wrong = ([t for t in side[row].tolist() if t >= 0] for side in (SETS, WRONG))
        found.append({
            "top1": float(int(x.argmax()) in right),
            "nll": -math.log(sum(float(law[t]) for t in right)),
            "pairwise": float(max(float(x[t]) for t in right) > max(float(x[t]) for t in wrong)),
            "logit_diff": sum(float(x[t]) for t in right) / len(right)
            - sum(float(x[t]) for t in wrong) / len(wrong),
            "prob_diff": sum(float(law[t]) for t in right) - sum(float(law[t]) for t in wrong),
        })  # fmt: skip
    return {key: sum(row[key] for row in found) / len(found) for key in found[0]}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_scores_are_those_of_whole_logits(name):
    model, task = tiny_model(name), make_task()
    wanted = literally(model, task)
    for batch in (1, 2, 5, 64):
        assert baseline(model, task, batch=batch) == pytest.approx(wanted, abs=1e-5)
    assert 0 < wanted["pairwise"] < 1
    less = baseline(model, make_task(wrong=False))
    assert less == pytest.approx({key: wanted[key] for key in ("top1", "nll")}, abs=1e-5)


def test_logits_are_made_where_answers_are():
    model, rows = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape)))
    baseline(model, make_task(), batch=3)
    # positions 8, 3, 8 and 5, 0
    assert rows == [(3, 2, 96), (2, 2, 96)]


def test_dropout_is_off_meanwhile():
    model, task = tiny_model("gpt2"), make_task()
    wanted = baseline(model, task)
    model.train()
    model.transformer.ln_f.eval()
    assert baseline(model, task) == wanted
    assert model.training
    assert not model.transformer.ln_f.training
    model.transformer.ln_f.forward = None
    with pytest.raises(TypeError):
        baseline(model, task)
    assert model.training


def test_tasks_that_a_model_cannot_do():
    model, task = tiny_model("llama"), make_task()
    share = baseline(model, task)["pairwise"]
    assert baseline(model, task, min_accuracy=share)["pairwise"] == share
    with pytest.raises(
        ValueError,
        match=rf"expected one that LlamaForCausalLM does, got pairwise accuracy {share:.2f} in "
        r"some, below min_accuracy 0.9 \(example \d is wrong: '[a-e]'\).*another model or task",
    ) as caught:
        baseline(model, task, min_accuracy=0.9)
    row = int(str(caught.value).split("example ")[1][0])
    assert baseline(model, task.select([row]))["pairwise"] == 0
    with pytest.raises(ValueError, match="got top1 accuracy"):
        baseline(model, make_task(wrong=False), min_accuracy=1.0)
    bare = Task(task.clean, task.corrupted, task.positions, task.answers, task.wrong_answers)
    with pytest.raises(ValueError, match=r"in this one, .* is wrong: \[\d+, "):
        baseline(model, bare, min_accuracy=0.9)
    with pytest.raises(ValueError, match="batch"):
        baseline(model, task, batch=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"pairwise accuracy 0\.00"):
        baseline(model, task, min_accuracy=0.1)
