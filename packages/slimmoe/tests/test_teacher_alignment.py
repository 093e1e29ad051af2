"""Teachers that speak of other tokens, and numbers that are not finite."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from slimmoe.distillation import DistillationTrainer, Teacher
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from made import without_layers
from moe_families import model, tokens
from test_distillation import options, rows, smaller

NAMES = [f"w{number}" for number in range(96)]
#: What follows each token.
NEXT = torch.randperm(96, generator=torch.Generator().manual_seed(7))


def tokenizer(names):
    ids = {name: number for number, name in enumerate(names)}
    made = Tokenizer(WordLevel(ids, unk_token=names[0]))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=names[0])


def made(folder, teacher, data=None, student=None, processing_class=None, **changes):
    data = rows(tokens("deepseek_v3", 8, 9)) if data is None else data
    known = {"per_device_train_batch_size": 8} | changes
    return DistillationTrainer(
        smaller() if student is None else student, teacher, options(folder, **known),
        train_dataset=data, processing_class=processing_class,
    )  # fmt: skip


@torch.no_grad()
def sure(ids=None):
    """A teacher that is sure of what follows each token; with ids, each token has another one."""
    found = without_layers(model("qwen3_moe"), range(4))
    found.model.norm.weight.fill_(1.0)
    weight = found.model.embed_tokens.weight.clone()
    weight /= weight.square().mean(-1, keepdim=True).sqrt()
    found.model.embed_tokens.weight.copy_(weight)
    found.lm_head.weight[NEXT] = 0.5 * weight
    if ids is not None:
        for part in (found.model.embed_tokens.weight, found.lm_head.weight):
            part.copy_(part.clone()[ids])
    return found


def succession(n=8, size=40):
    """Texts in which each token follows from the one before."""
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(1))[:n, None]
    while ids.shape[1] < size:
        ids = torch.cat([ids, NEXT[ids[:, -1:]]], 1)
    return ids


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_are_compared_by_their_ids(tmp_path):
    model("deepseek_v3", seed=9).save_pretrained(tmp_path / "teacher")
    tokenizer(NAMES).save_pretrained(tmp_path / "teacher")
    smaller().save_pretrained(tmp_path / "student")
    swapped = [*NAMES[:5], NAMES[6], NAMES[5], *NAMES[7:]]
    tokenizer(swapped).save_pretrained(tmp_path / "student")
    path, run = str(tmp_path / "teacher"), tmp_path / "run"
    match = r"2 that have other ids: 'w5' \(6 and 5\), 'w6' \(5 and 6\)"
    for teacher in (path, tmp_path / "teacher", Teacher.from_pretrained(path)):
        with pytest.raises(ValueError, match=match):
            made(run, teacher, processing_class=tokenizer(swapped))
    # a folder of a student has its own
    with pytest.raises(ValueError, match=match):
        made(run, path, student=tmp_path / "student")
    made(run, path, student=tmp_path / "student", processing_class=tokenizer(NAMES))
    with pytest.raises(ValueError, match=r"'more' \(96 and none\)"):
        made(run, path, processing_class=tokenizer([*NAMES, "more"]))
    with pytest.raises(ValueError, match=r"'w95' \(none and 95\)"):
        made(run, path, processing_class=tokenizer(NAMES[:95]))
    made(run, path, processing_class=tokenizer(swapped), check_teacher=False)


def test_tokenizers_that_are_not_known(tmp_path):
    model("deepseek_v3", seed=9).save_pretrained(tmp_path / "teacher")
    for teacher in (str(tmp_path / "teacher"), model("deepseek_v3", seed=9)):
        for known in (None, tokenizer(NAMES[::-1])):
            made(tmp_path / "run", teacher, processing_class=known)


# --- what a teacher says of labels ---------------------------------------------------------------


def test_a_teacher_of_other_ids_is_refused_at_the_first_step(tmp_path):
    data = rows(succession())
    made(tmp_path, sure(), data).train()
    # what it knows is under other ids: the same law, of other tokens
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    found = made(tmp_path, sure(ids), data)
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    with pytest.raises(ValueError, match=r"teacher_model: its cross entropy of the labels is \d"):
        found.train()
    assert found.state.global_step == 0
    assert all(torch.equal(p, before[name]) for name, p in found.model.named_parameters())
    # the same texts under those ids
    place = torch.empty_like(ids)
    place[ids] = torch.arange(96)
    made(tmp_path, sure(ids), rows(place[succession()])).train()
    made(tmp_path, sure(ids), data, check_teacher=False).train()


def test_small_batches_are_looked_at_together(tmp_path):
    """A few labels prove nothing: 256 of them are awaited."""
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    found = made(tmp_path, sure(ids), rows(succession()), per_device_train_batch_size=2,
                 max_steps=9)  # fmt: skip
    with pytest.raises(ValueError, match="cross entropy"):
        found.train()
    # 78 labels in each
    assert found.state.global_step == 3


def test_labels_are_those_that_count(tmp_path):
    """A teacher is asked for labels alone: it is wrong of the others."""
    ids = succession()
    labels = ids.clone()
    ids[:, :20] = tokens("qwen3_moe", 8, 20)
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    with pytest.raises(ValueError, match="cross entropy"):
        made(tmp_path, sure(), data).train()
    for row in data:
        row["labels"][:21] = -100
    made(tmp_path, sure(), data).train()


def test_labels_that_a_teacher_does_not_know(tmp_path):
    teacher = model("deepseek_v3", seed=9, vocab_size=90)
    data = rows(torch.full((4, 5), 85))
    data[0]["labels"] = torch.full((5,), 95)
    for row in data[1:]:
        row["labels"] = row["input_ids"]
    with pytest.raises(ValueError, match="teacher_model: expected all labels known, got int 95"):
        made(tmp_path, teacher, data).train()


def test_a_student_that_is_nothing_like_its_teacher(tmp_path, caplog):
    data = rows(succession())
    # eleven nats, of which a batch of four has a quarter
    for scale, told in ((1.0, False), (4.0, True)):
        student = model("qwen3_moe", seed=4)
        with torch.no_grad():
            student.lm_head.weight.mul_(scale)
        for accumulation in (1, 4):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "slimmoe"):
                made(tmp_path, sure(), data, student, max_steps=1, learning_rate=0.0,
                     per_device_train_batch_size=2,
                     gradient_accumulation_steps=accumulation).train()  # fmt: skip
            assert any("divergence" in line for line in caplog.messages) == told


# --- numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False])
def test_a_teacher_that_is_not_finite(check, tmp_path):
    teacher = model("qwen3_moe")
    with torch.no_grad():
        teacher.model.norm.weight[3] = float("inf")
    match = "teacher_model: its hidden states are not finite"
    with pytest.raises(FloatingPointError, match=match):
        made(tmp_path, teacher, check_teacher=check).train()


def test_a_head_that_is_not_finite(tmp_path):
    teacher = model("qwen3_moe")
    with torch.no_grad():
        teacher.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="teacher_model: its logits are not finite"):
        made(tmp_path, teacher).train()


def test_a_router_that_is_not_finite(tmp_path):
    student = model("qwen3_moe")
    with torch.no_grad():
        student.model.layers[2].mlp.gate.weight[1, 1] = float("nan")
    match = r"model.layers.2: logits of its router are not finite at step 0"
    with pytest.raises(FloatingPointError, match=match):
        made(tmp_path, model("qwen3_moe"), student=student).train()
