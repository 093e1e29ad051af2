"""The load of experts: the loss that evens it out, over the batches of a step, and what is told."""

import math
import sys
from pathlib import Path

import pytest
import torch
from slimmoe.distillation import DistillationTrainer
from slimmoe.distillation.balancing import summed_probabilities
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import FAMILIES, model, tokens
from test_distillation import options, rows
from test_mtp import head_of

SOFTMAX = tuple(name for name in FAMILIES if name != "deepseek_v3")


def trainer_of(folder, student, data=None, mtp=None, **changes):
    data = rows(tokens(student, 8, 9)) if data is None else data
    teacher = model("qwen3_moe", seed=9)
    return DistillationTrainer(
        student, teacher, options(folder, **changes), mtp=mtp, train_dataset=data
    )


def step(trainer, batches):
    """Go through the batches of a step as Trainer does; return losses."""
    trainer.model.train()
    given, count = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    losses = []
    for batch in given:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def said(student, batch):
    """Of each router, logits ``(B T, N)``; not every class puts them out."""
    seen, handles = [], []
    for layer in student.model.layers:
        router = getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None))
        if router is not None:
            handles.append(router.register_forward_hook(lambda _m, _a, out: seen.append(out[0])))
    student(**batch)
    for handle in handles:
        handle.remove()
    return tuple(seen)


def written_out(student, batches, known):
    """The loss of a step, token by token; batch b knows of what was chosen in ``known[b]``."""
    k = student.config.num_experts_per_tok
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
             for batch in batches]  # fmt: skip
    logits = [said(student, batch) for batch in batches]
    every = sum(int(mask.sum()) for mask in masks)
    layers, total = len(logits[0]), 0.0
    for layer in range(layers):
        for b, seen in enumerate(known):
            n = logits[b][layer].shape[-1]
            chosen, counted = torch.zeros(n, dtype=torch.float64), 0
            for other in seen:
                for row, real in zip(logits[other][layer].detach(), masks[other], strict=True):
                    if real:
                        counted += 1
                        chosen[row.topk(k).indices] += 1
            law = logits[b][layer][masks[b]].double().softmax(-1)
            total = total + n * (chosen / counted * law.sum(0) / every).sum() / layers
    return total


def slopes(student):
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def padded(student, n=4, size=7):
    """Batches of as many texts, of which fewer and fewer tokens are real."""
    ids = tokens(student, 3 * n, size).view(3, n, size)
    made = []
    for number, some in enumerate(ids):
        mask = torch.ones_like(some)
        mask[:, size - number * 2 :] = 0
        made.append({"input_ids": some * mask, "attention_mask": mask})
    return made


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOFTMAX)
def test_it_is_that_of_transformers_for_each_layer(family, tmp_path):
    student = model(family)
    batch = padded(student)[1]
    k = student.config.num_experts_per_tok
    wanted = torch.stack([
        load_balancing_loss_func((logits,), logits.shape[-1], k, batch["attention_mask"])
        for logits in said(student, batch)
    ])  # fmt: skip
    assert len(wanted) == (3 if family == "deepseek_v2" else 4)
    losses = [
        step(trainer_of(tmp_path, student, router_aux_loss_coef=coefficient), [batch])[0]
        for coefficient in (0.0, 2.0)
    ]
    assert losses[1] - losses[0] == pytest.approx(2 * float(wanted.mean()), rel=1e-4)


def test_layers_are_not_thrown_together(tmp_path):
    """Each layer has all tokens on experts of its own: their sum over layers is even."""
    student = model("qwen3_moe", num_experts=8, num_experts_per_tok=2)
    with torch.no_grad():
        student.model.embed_tokens.weight[:, 0] = 50.0
        for index, layer in enumerate(student.model.layers):
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[2 * index : 2 * index + 2, 0] = 10.0
    batch = {"input_ids": tokens(student, 4, 7)}
    logits = said(student, batch)
    assert float(load_balancing_loss_func(logits, 8, 2)) == pytest.approx(2, rel=1e-3)
    losses = [step(trainer_of(tmp_path, student, router_aux_loss_coef=c), [batch])[0]
              for c in (0.0, 1.0)]  # fmt: skip
    # all that there is, on 2 of 8
    assert losses[1] - losses[0] == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_of_a_step(ahead, tmp_path):
    """Fractions are of batches so far, or, if the step is looked through first, of all of them."""
    student = model("qwen3_moe")
    batches = padded(student)
    known = [[0, 1, 2]] * 3 if ahead else [[0], [0, 1], [0, 1, 2]]
    plain = trainer_of(tmp_path, student, router_aux_loss_coef=0.0)
    without = step(plain, batches)
    base = slopes(student)
    student.zero_grad()
    found = trainer_of(tmp_path, student, router_aux_loss_coef=3.0, balance_ahead=ahead)
    for _ in range(2):
        # nothing of a step is left in the next
        student.zero_grad()
        losses = step(found, batches)
    given = slopes(student)
    student.zero_grad()
    wanted = written_out(student, batches, known)
    assert sum(losses) - sum(without) == pytest.approx(3 * float(wanted.detach()), rel=1e-4)
    other = written_out(student, batches, [[0], [1], [2]])
    assert abs(float(other.detach() - wanted.detach())) > 1e-3
    (3 * wanted).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(given[name] - base[name], p.grad, rtol=1e-3, atol=2e-6)
    gate = student.model.layers[0].mlp.gate.weight
    assert float(gate.grad.abs().max()) > 1e-3


def test_a_step_that_is_looked_through_is_as_one_batch(tmp_path):
    data = rows(tokens("qwen3_moe", 8, 9))
    weights, told = [], []
    for size, steps, ahead in ((8, 1, False), (2, 4, True), (2, 4, False)):
        student = model("qwen3_moe")
        found = trainer_of(tmp_path, student, data, per_device_train_batch_size=size, max_steps=2,
                           gradient_accumulation_steps=steps, router_aux_loss_coef=1.0,
                           balance_ahead=ahead, optim="sgd", learning_rate=0.1)  # fmt: skip
        found.train()
        weights.append({name: p.detach().clone() for name, p in student.named_parameters()})
        told.append([t["load_balancing"] for t in found.state.log_history if "loss" in t])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert told[1] == pytest.approx(told[0], rel=1e-5)
    gate = "model.layers.0.mlp.gate.weight"
    assert float((weights[2][gate] - weights[0][gate]).abs().max()) > 1e-4


def test_the_gradient_of_probabilities():
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=draws, dtype=torch.float64, requires_grad=True)
    counted = torch.tensor([True, False, True, True, False, True])
    found = summed_probabilities(logits, counted)
    torch.testing.assert_close(found, logits.softmax(-1)[counted].sum(0))
    assert torch.autograd.gradcheck(lambda x: summed_probabilities(x, counted), (logits,))


def test_modules_of_mtp_are_balanced_too(tmp_path):
    student, head = head_of("qwen3_next", seed=5)
    # padding on the left: the first token of a text has none before it
    batch = {name: tensor.flip(1) for name, tensor in padded(student)[1].items()}
    seen = []
    handle = head.modules_[0].layer.mlp.gate.register_forward_hook(
        lambda _module, _args, output: seen.append(output[0])
    )
    losses = [
        step(trainer_of(tmp_path, student, mtp=head, router_aux_loss_coef=c), [batch])[0]
        for c in (0.0, 1.0)
    ]
    handle.remove()
    mask = batch["attention_mask"]
    every = [*((logits, mask) for logits in said(student, batch)),
             (seen[-1], mask[:, 1:] * mask[:, :-1])]  # fmt: skip
    wanted = [float(load_balancing_loss_func((logits,), 8, 2, some)) for logits, some in every]
    assert len(wanted) == 5
    assert losses[1] - losses[0] == pytest.approx(sum(wanted) / 5, rel=1e-4)


def test_layers_that_are_computed_again(tmp_path):
    found = []
    for again in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        student = model("qwen3_moe")
        if again is not None:
            student.gradient_checkpointing_enable(again)
        trainer = trainer_of(tmp_path, student, router_aux_loss_coef=3.0)
        if again == {"use_reentrant": True}:
            with pytest.raises(ValueError, match="use_reentrant"):
                step(trainer, padded(student))
            continue
        step(trainer, padded(student))
        found.append(slopes(student))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, msg=name)


# --- whose coefficient, and what is told ---------------------------------------------------------


def test_coefficients(tmp_path):
    def of(student, **changes):
        return trainer_of(tmp_path, student, **changes).balancing.coefficient

    assert of(model("qwen3_moe")) == 0.001
    assert of(model("olmoe")) == 0.01
    assert of(model("deepseek_v2")) == of(model("deepseek_v3")) == 0
    assert of(model("deepseek_v2"), router_aux_loss_coef=0.5) == 0.5
    assert of(model("qwen3_moe"), router_aux_loss_coef=0.0) == 0
    dense = model("qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    assert of(dense) == 0
    for student in (model("deepseek_v3"), dense):
        with pytest.raises(ValueError, match="router_aux_loss_coef: expected"):
            of(student, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected a number from 0"):
        options(tmp_path, router_aux_loss_coef=-1.0)


def test_what_is_told(tmp_path):
    """Of all steps since the last time; without a loss, too."""
    student = model("deepseek_v3")
    data = rows(tokens(student, 8, 9))
    found = trainer_of(tmp_path, student, data, max_steps=4, logging_steps=2, learning_rate=0.0,
                       per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    found.train()
    told = [t for t in found.state.log_history if "loss" in t]
    assert "load_balancing" not in told[0]
    chosen = []
    handles = [layer.mlp.gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[-1]))
               for layer in student.model.layers[1:]]  # fmt: skip
    student(torch.stack([row["input_ids"] for row in data]))
    for handle in handles:
        handle.remove()
    load = torch.stack([some.flatten().bincount(minlength=8) for some in chosen]).double()
    # two steps of four texts each are all eight
    law = load / load.sum(-1, keepdim=True)
    entropy = -torch.xlogy(law, law).sum(-1) / math.log(8)
    assert told[0]["load_entropy"] == pytest.approx(float(entropy.mean()), rel=1e-6)
    assert told[0]["dead_experts"] == int((load == 0).sum())
    # what was told is over
    loads = []
    for seed in (1, 2, 1):
        step(found, [{"input_ids": tokens(student, 1, 3, seed)}])
        loads.append(found.balancing.load())
    assert loads[0] == loads[2] != loads[1]
    assert found.balancing.load() == {}


def test_dead_experts_are_counted(tmp_path):
    student = model("qwen3_moe")
    with torch.no_grad():
        # ties go to one of them, whatever the token is
        student.model.layers[2].mlp.gate.weight.zero_()
    found = trainer_of(tmp_path, student, max_steps=1, router_aux_loss_coef=1.0)
    found.train()
    told = found.state.log_history[0]
    assert 6 <= told["dead_experts"] < 12
    assert 0 < told["load_entropy"] < 1
    assert told["load_balancing"] > 2


def test_it_evens_out(tmp_path):
    def end(coefficient):
        student = model("qwen3_moe")
        with torch.no_grad():
            for layer in student.model.layers:
                layer.mlp.gate.weight.mul_(3)
        found = trainer_of(tmp_path, student, max_steps=40, router_aux_loss_coef=coefficient,
                           learning_rate=3e-3, gradient_accumulation_steps=2,
                           per_device_train_batch_size=2)  # fmt: skip
        found.train()
        told = [t["load_entropy"] for t in found.state.log_history if "loss" in t]
        return sum(told[-5:]) / 5

    assert end(1.0) > end(0.0) + 0.02


def test_an_evaluation_knows_no_balance(tmp_path):
    student = model("qwen3_moe")
    losses = []
    for coefficient in (0.0, 100.0):
        found = trainer_of(tmp_path, student, router_aux_loss_coef=coefficient)
        losses.append(found.evaluate(rows(tokens(student, 5, 9)))["eval_loss"])
    assert losses[0] == losses[1]
