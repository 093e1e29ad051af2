"""The Trainer of distillation: its loss written out, batches, files, and going on."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from slimmoe import UnsupportedModelError
from slimmoe.distillation import DistillationArguments, DistillationTrainer, Teacher
from slimmoe.distillation.rows import targets
from slimmoe.distillation.schedules import cosine, linear
from slimmoe.mtp import MTPHead
from torch.nn import functional
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import model, tokens
from test_mtp import head_of, saved


def options(folder, **changes):
    known = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "use_cpu": True, "lr_scheduler_type": "constant", "seed": 1,
    }  # fmt: skip
    return DistillationArguments(**(known | changes))


def rows(ids):
    return [{"input_ids": row} for row in ids]


def smaller(seed=3, **changes):
    """A student of the same vocabulary, narrower than its teacher."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_experts": 4}
    return model("deepseek_v3", seed=seed, **(sizes | changes))


def trainer_of(folder, student=None, teacher=None, mtp=None, data=None, **changes):
    student = smaller() if student is None else student
    teacher = model("deepseek_v3", seed=9) if teacher is None else teacher
    data = rows(tokens(teacher, 16, 9)) if data is None else data
    return DistillationTrainer(
        student, teacher, options(folder, **changes), mtp=mtp, train_dataset=data
    )


def term(logits, teacher, labels, kd_weight, temperature=1.0):
    """One row's loss, as the formula says."""
    lm = functional.cross_entropy(logits, labels)
    law = (teacher / temperature).softmax(-1)
    kd = -(law * (logits / temperature).log_softmax(-1)).sum()
    return (1 - kd_weight) * lm + kd_weight * temperature**2 * kd


def written_out(
    student, teacher, head, ids, kd_weight, mtp_weight, temperature=1.0, mtp_kd_weight=None
):
    """The loss of a batch without padding, row by row."""
    inside = kd_weight if mtp_kd_weight is None else mtp_kd_weight
    theirs = teacher(ids).logits
    hidden = student.get_decoder()(ids).last_hidden_state
    batch, size = ids.shape
    count, total = batch * (size - 1), 0.0
    states = [hidden, *(head(hidden, ids) if head is not None else [])]
    for depth, given in enumerate(states):
        logits = student.lm_head(given)
        for b in range(batch):
            for i in range(size - depth - 1):
                one = term(logits[b, i], theirs[b, i + depth], ids[b, i + depth + 1],
                           inside if depth else kd_weight, temperature)  # fmt: skip
                total = total + one * (mtp_weight if depth else 1.0) / count
    return total


@pytest.mark.parametrize(("kd_weight", "temperature"), [(1.0, 1.0), (0.6, 2.0), (0.0, 1.0)])
def test_the_loss_is_that_of_the_formulas(kd_weight, temperature, tmp_path):
    teacher, (student, head) = model("deepseek_v3", seed=9), head_of("deepseek_v3", 2, seed=5)
    found = trainer_of(tmp_path, student, teacher, head, kd_weight=(kd_weight, kd_weight),
                       mtp_weight=(0.3, 0.3), temperature=temperature)  # fmt: skip
    ids = tokens(teacher, 3, 7)
    count = found._get_num_items_in_batch([{"input_ids": ids}], ids.device)
    assert int(count) == 3 * 6
    loss = found.compute_loss(student, {"input_ids": ids}, num_items_in_batch=count)
    loss.backward()
    slopes = {name: p.grad.clone() for name, p in student.named_parameters()
              if p.grad is not None}  # fmt: skip
    student.zero_grad()
    wanted = written_out(student, teacher, head, ids, kd_weight, 0.3, temperature)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    for name, p in student.named_parameters():
        if p.grad is None:
            assert name not in slopes
            continue
        torch.testing.assert_close(slopes[name], p.grad, rtol=1e-3, atol=1e-6)
    assert any(name.startswith("mtp_head") for name in slopes)
    assert all(p.grad is None for p in teacher.parameters())


def test_modules_with_a_weight_of_distillation_of_their_own(tmp_path):
    teacher, (student, head) = model("deepseek_v3", seed=9), head_of("deepseek_v3", 2, seed=5)
    found = trainer_of(tmp_path, student, teacher, head, kd_weight=(0.9, 0.1),
                       mtp_kd_weight=(0.2, 0.8), mtp_weight=(0.3, 0.3))  # fmt: skip
    ids = tokens(teacher, 3, 7)
    found.state.max_steps, found.state.global_step = 4, 1
    assert found.weights == pytest.approx((0.7, 0.3, 0.35))
    loss = found.compute_loss(student, {"input_ids": ids}, num_items_in_batch=torch.tensor(18))
    wanted = written_out(student, teacher, head, ids, 0.7, 0.3, mtp_kd_weight=0.35)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    with pytest.raises(ValueError, match="mtp_kd_weight: expected numbers from 0 to 1"):
        options(tmp_path, mtp_kd_weight=(0.0, 2.0))


def test_a_student_that_is_its_teacher(tmp_path):
    same = model("qwen3_moe")
    teacher = Teacher(model("qwen3_moe"))
    found = trainer_of(tmp_path, same, teacher, data=rows(tokens(same, 8, 9)), max_steps=1,
                       router_aux_loss_coef=0.0)  # fmt: skip
    found.train()
    told = found.state.log_history[0]
    assert abs(told["kl"]) < 1e-6
    assert told["agreement"] == 1
    assert told["grad_norm"] < 1e-5


def test_what_rows_predict():
    labels = torch.arange(10, 24).view(2, 7).clone()
    labels[0, 3] = -100
    document = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2]])
    for depth in range(3):
        ahead, teacher = targets(labels, document, depth)
        ahead, teacher = ahead.view(2, -1), teacher.view(2, -1)
        assert ahead.shape[1] == 7 - depth
        for b in range(2):
            for i in range(7 - depth):
                place = i + depth + 1
                known = place < 7 and document[b, i] == document[b, min(place, 6)]
                wanted = int(labels[b, place]) if known else -100
                assert int(ahead[b, i]) == wanted
                assert int(teacher[b, i]) == (-1 if wanted == -100 else 7 * b + i + depth)


def test_padding_and_documents_are_left_out(tmp_path):
    """A padded batch, and one of packed documents, are as their texts alone."""
    teacher = model("deepseek_v3")
    found = trainer_of(tmp_path, smaller(), teacher, kd_weight=(0.5, 0.5))
    ids = tokens(teacher, 2, 6)
    short = ids[1:, :4]
    padded = torch.cat([ids[:1], functional.pad(short, (0, 2))])
    mask = torch.ones_like(padded)
    mask[1, 4:] = 0
    inputs = {"input_ids": padded, "attention_mask": mask}
    count = found._get_num_items_in_batch([inputs], ids.device)
    assert int(count) == 5 + 3
    together = found.compute_loss(found.model, dict(inputs), num_items_in_batch=count)
    alone = sum(
        found.compute_loss(found.model, {"input_ids": part}, num_items_in_batch=count)
        for part in (ids[:1], short)
    )
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    left = {"input_ids": torch.cat([ids[:1], functional.pad(short, (2, 0))]),
            "attention_mask": mask.flip(1)}  # fmt: skip
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert int(found._get_num_items_in_batch([left], ids.device)) == 5 + 3
    again = found.compute_loss(found.model, dict(left), num_items_in_batch=count)
    assert float(again) == pytest.approx(float(alone), rel=1e-4)
    packed = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    assert int(found._get_num_items_in_batch([packed], ids.device)) == 4


def test_accumulated_batches_are_as_one(tmp_path):
    data = [{"input_ids": row, "labels": label} for row, label in zip(
        tokens("deepseek_v3", 8, 9), tokens("deepseek_v3", 8, 9), strict=True)]  # fmt: skip
    for number, row in enumerate(data):
        # not as many labels in each
        row["labels"] = row["labels"].clone()
        row["labels"][: number + 1] = -100
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        student, head = head_of("deepseek_v3", seed=5)
        # what a model says of its own loss does not matter
        student.accepts_loss_kwargs = False
        found = trainer_of(tmp_path, student, model("deepseek_v3", seed=9), head, data,
                           per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                           max_steps=3, optim="sgd", learning_rate=0.1)  # fmt: skip
        found.train()
        weights.append({name: p.detach().clone() for name, p in student.named_parameters()})
        losses = [told["loss"] for told in found.state.log_history if "loss" in told]
        assert len(losses) == 3
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)


# --- files ---------------------------------------------------------------------------------------


def test_what_is_saved_loads_in_plain_transformers(tmp_path):
    student, head = head_of("deepseek_v3", seed=5)
    found = trainer_of(tmp_path / "run", student, mtp=head)
    found.train()
    found.save_model(str(tmp_path / "saved"))
    loaded, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(told.values()), told
    state = student.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])
    again = MTPHead.from_pretrained(tmp_path / "saved", loaded)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[f"mtp_head.{name}"])
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.layers.4.enorm.weight"] == "model-mtp.safetensors"
    assert found.mtp is head


@pytest.mark.parametrize("with_head", [False, True])
def test_what_was_stopped_goes_on(with_head, tmp_path):
    """With the same bits as what was not."""

    def made(folder, **changes):
        student, head = head_of("deepseek_v3", seed=5) if with_head else (smaller(), None)
        return trainer_of(folder, student, mtp=head, max_steps=6, save_strategy="steps",
                          save_steps=3, **changes)  # fmt: skip

    whole = made(tmp_path / "whole")
    whole.train()
    again = made(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    wanted = whole.model.state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    told = [[(t["step"], t["loss"], t["kl"], t["kd_weight"]) for t in run.state.log_history
             if "loss" in t] for run in (whole, again)]  # fmt: skip
    assert told[1] == told[0]


def test_terms_are_means_over_steps(tmp_path):
    each, pairs = (
        [told for told in run.state.log_history if "kl" in told]
        for run in (trainer_of(tmp_path, logging_steps=n) for n in (1, 2))
        if run.train()
    )
    assert (len(each), len(pairs)) == (4, 2)
    for number, pair in enumerate(pairs):
        two = each[2 * number : 2 * number + 2]
        for name in ("lm", "kl", "entropy", "loss"):
            mean = sum(told[name] for told in two) / 2
            assert pair[name] == pytest.approx(mean, rel=1e-5), name


def test_folders_with_modules(tmp_path):
    student, head = head_of("deepseek_v3", seed=5)
    saved(student, head, tmp_path / "student")
    model("deepseek_v3", seed=9).save_pretrained(tmp_path / "teacher")
    found = DistillationTrainer(
        tmp_path / "student", str(tmp_path / "teacher"), options(tmp_path / "run", max_steps=2),
        train_dataset=rows(tokens("deepseek_v3", 8, 9)),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    assert found.mtp is not None
    found.train()
    told = found.state.log_history[0]
    assert {"lm", "kl", "entropy", "agreement", "mtp1_lm", "mtp1_kl", "kd_weight",
            "mtp_weight"} <= told.keys()  # fmt: skip
    moved = {name.split(".")[0] for name, p in found.model.named_parameters()
             if not torch.equal(p, before[name])}  # fmt: skip
    assert moved == {"model", "lm_head", "mtp_head"}


def test_modules_that_are_left_as_they_are(tmp_path):
    student, head = head_of("deepseek_v3", seed=5)
    before = {name: t.clone() for name, t in head.state_dict().items()}
    found = trainer_of(tmp_path, student, mtp=head, mtp_weight=(0.0, 0.0))
    found.train()
    assert all(torch.equal(t, before[name]) for name, t in head.state_dict().items())
    assert "mtp1_lm" not in found.state.log_history[0]


# --- learning, schedules, refusals ---------------------------------------------------------------


def test_a_student_learns_what_its_teacher_says(tmp_path):
    found = trainer_of(tmp_path, max_steps=60, learning_rate=1e-2, kd_weight=(1.0, 1.0))
    found.train()
    kl = [told["kl"] for told in found.state.log_history if "kl" in told]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_weights_over_a_run(tmp_path):
    assert [linear(u, 1.0, 0.75) for u in (0, 0.5, 1)] == [1.0, 0.875, 0.75]
    for u in (0.0, 0.3, 1.0):
        paper = 0.1 + 0.2 * (1 + math.cos(math.pi * u)) / 2
        assert cosine(u, 0.3, 0.1) == pytest.approx(paper)
    found = trainer_of(tmp_path, max_steps=8, schedule_span=(0.5, 1.0))
    found.train()
    weights = [told["kd_weight"] for told in found.state.log_history if "kd_weight" in told]
    assert weights[0] == pytest.approx(1 - 0.25 * (0.5 + 0.5 / 8))
    assert weights[-1] == 0.75
    assert all(a > b for a, b in pairwise(weights))


def test_options_that_there_are_not(tmp_path):
    for changes, match in (
        ({"kd_weight": (1.5, 0)}, "kd_weight"), ({"kd_weight": (1.0,)}, "two numbers"),
        ({"temperature": 0.0}, "temperature"), ({"schedule_span": (0.5, 0.5)}, "a rising pair"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            options(tmp_path, **changes)
    assert options(tmp_path, kd_weight=0.5).kd_weight == (0.5, 0.5)


@pytest.mark.parametrize(
    ("flag", "match"), [("is_fsdp_enabled", "version 2"), ("is_deepspeed_enabled", "FSDP2")]
)
def test_what_shards_weights_otherwise_is_refused(flag, match, tmp_path, monkeypatch):
    """As a Trainer finds it on GPUs; on a CPU, accelerate leaves it out."""
    create = DistillationTrainer.create_accelerator_and_postprocess

    def patched(trainer):
        create(trainer)
        setattr(trainer, flag, True)

    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", patched)
    with pytest.raises(ValueError, match=match):
        trainer_of(tmp_path)


def test_copies_of_one_process_are_refused(tmp_path):
    args = options(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="several GPUs need as many processes"):
        DistillationTrainer(smaller(), model("deepseek_v3", seed=9), args)
    with pytest.raises(ValueError, match="ddp_find_unused_parameters: expected False"):
        options(tmp_path, ddp_find_unused_parameters=True)


def test_models_whose_logits_are_others(tmp_path):
    strange = model("qwen3_moe")
    strange.lm_head = torch.nn.Linear(32, 96, bias=True)
    with pytest.raises(UnsupportedModelError, match="teacher_model: expected logits"):
        Teacher(strange)
    with pytest.raises(UnsupportedModelError, match="model: expected logits"):
        trainer_of(tmp_path, strange)


def test_a_loss_that_is_not_finite(tmp_path):
    student = smaller()
    with torch.no_grad():
        student.lm_head.weight[0, 0] = float("nan")
    found = trainer_of(tmp_path, student)
    with pytest.raises(FloatingPointError, match="loss: nan at step 0"):
        found.train()
