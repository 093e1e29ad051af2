"""The trainer against a plain loop over the same batches, dp-accounting, and an unbroken run."""

import functools
import json
import math

import dp_accounting as dp
import pytest
import torch
from dp_accounting import pld
from flashdp import DPTrainer, PrivacyArguments, PrivacyError, PrivacyReport
from flashdp import trainer as trainer_module
from shared_kernels.testing.models import tiny_inputs, tiny_model
from transformers import DataCollatorWithFlattening, TrainingArguments

N, STEPS = 12, 20
SMALL = {"num_hidden_layers": 1}
INPUTS = tiny_inputs("llama", batch=N, length=6)
for k in range(N):
    # Lengths differ, or a mean over the tokens of the batch would not show.
    INPUTS["labels"][k, : k % 4] = -100
DATA = [{key: value[k] for key, value in INPUTS.items()} for k in range(N)]
DRAWS = [
    torch.randperm(N, generator=torch.Generator().manual_seed(k))[: k % 7].sort().values.numpy()
    for k in range(STEPS)
]
NO_NOISE = PrivacyArguments(
    noise_multiplier=0.0, max_grad_norm=1e6, expected_batch_size=4, target_delta=1e-3
)
NOISE = NO_NOISE.replace(noise_multiplier=1.0, max_grad_norm=1.0)


def arguments(folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(**defaults | kwargs)


def model_of(**kwargs):
    return tiny_model("llama", **SMALL | kwargs)


def make(folder, privacy=NO_NOISE, *, model=None, draws=DRAWS, data=DATA, **kwargs):
    ours = (
        "unit_ids",
        "log_non_private_loss",
        "compute_loss_func",
        "eval_dataset",
        "data_collator",
    )
    extra = {key: kwargs.pop(key) for key in ours if key in kwargs}
    model = model_of() if model is None else model
    trainer = DPTrainer(
        model, arguments(folder, **kwargs), train_dataset=data, privacy=privacy, **extra
    )
    if draws is not None:
        trainer.loader.sampler.draw = lambda step: draws[step]
    return trainer


def assert_close(left, right, atol=1e-5):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol, msg=name)


def plain_loop(model, steps, divisor):
    """The definition: the mean over a public number of the drawn rows' own losses."""
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(p.sum() * 0 for p in params)
        for k in DRAWS[step]:
            loss = loss + model(**{key: v[k : k + 1] for key, v in INPUTS.items()}).loss
        (loss / divisor).backward()
        optimizer.step()
    return model.state_dict()


# -- equal to a plain loop -------------------------------------------------------------------------


def test_without_noise_and_clipping_it_is_ordinary_training(tmp_path):
    trainer = make(tmp_path, max_steps=STEPS)
    trainer.train()
    assert trainer.engine.accountant.steps == STEPS
    assert_close(trainer.model.state_dict(), plain_loop(model_of(), STEPS, 4))


def test_physical_batches_change_nothing(tmp_path):
    found = []
    for size in (3, 8):
        trainer = make(tmp_path / str(size), NOISE.replace(noise_multiplier=0.0),
                       per_device_train_batch_size=size, max_steps=4)  # fmt: skip
        trainer.train()
        assert trainer.args.gradient_accumulation_steps == math.ceil(12 / size)
        found.append(trainer.model.state_dict())
    assert_close(*found)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model_of(), config)

    trainer = make(tmp_path, model=adapted(), max_steps=4)
    trainer.train()
    assert_close(trainer.model.state_dict(), plain_loop(adapted(), 4, 4))
    assert all("lora_" in c.parameter for c in trainer.privacy_report().coverage)


def test_the_first_batch_shows_that_units_are_independent(tmp_path):
    trainer = make(tmp_path, NOISE)
    trainer.train()
    assert trainer.privacy_report().independence == "loss"
    trainer = make(tmp_path, NOISE.replace(check_independence=False), max_steps=1)
    trainer.train()
    assert trainer.privacy_report().independence == "skipped"


def test_one_loss_per_row_that_depends_on_other_rows(tmp_path):
    def contrast(outputs, labels, num_items_in_batch=None):
        rows = outputs.logits.mean((1, 2))
        return rows * rows.mean()

    trainer = make(tmp_path, compute_loss_func=contrast)
    with pytest.raises(PrivacyError, match="so it is the loss"):
        trainer.train()
    assert trainer.engine.accountant.steps == 0


def test_rows_of_a_user_are_one_unit(tmp_path):
    privacy = NOISE.replace(
        noise_multiplier=0.0, unit_ids_key="user", max_rows_per_unit=2, expected_batch_size=2
    )
    data = [{**row, "user": k // 2} for k, row in enumerate(DATA)]
    found = []
    for given in (data, DATA):
        ids = None if given is data else [k // 2 for k in range(N)]
        trainer = make(tmp_path, privacy, data=given, unit_ids=ids, draws=[DRAWS[3] % 6] * 2,
                       max_steps=2)  # fmt: skip
        trainer.train()
        assert trainer.privacy_report().user_level
        assert trainer.privacy_report().public_n == 6
        found.append(trainer.model.state_dict())
    assert_close(*found, atol=0)


# -- the budget ------------------------------------------------------------------------------------


def test_epsilon_is_that_of_dp_accounting_for_the_steps_taken(tmp_path):
    privacy = NOISE.replace(expected_batch_size=2, max_batch_size=4)
    trainer = make(tmp_path, privacy, draws=None)
    trainer.train()
    event = dp.TruncatedSubsampledGaussianDpEvent(N, 2 / N, 4, 1.0)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp.SelfComposedDpEvent(event, 3))
    report = PrivacyReport.load(tmp_path)
    assert report == trainer.privacy_report()
    assert report.epsilon == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-3)
    assert (report.steps, report.public_n, report.max_grad_norm) == (3, N, pytest.approx(1.0))
    names = {name for name, _ in trainer.model.named_parameters()}
    # The embedding's matrix is clipped in both of its uses.
    assert {c.parameter for c in report.coverage} == {*names, "lm_head.weight"}


def test_a_target_is_reached_in_the_steps_of_the_epochs(tmp_path):
    privacy = PrivacyArguments(target_epsilon=3.0, target_delta=1e-3, expected_batch_size=4)
    trainer = make(tmp_path, privacy, draws=None, max_steps=-1, num_train_epochs=1.5)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == math.ceil(1.5 * N / 4)
    assert trainer.state.epoch == pytest.approx(5 / 3)
    assert 2.9 < trainer.privacy_report().epsilon <= 3.0
    after = trainer.model.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n, _ in trainer.model.named_parameters())


def test_training_stops_before_the_target_is_exceeded(tmp_path, monkeypatch):
    # The same question is asked four times.
    monkeypatch.setattr(trainer_module, "calibrate", functools.cache(trainer_module.calibrate))
    privacy = PrivacyArguments(target_epsilon=3.0, target_delta=1e-3, expected_batch_size=4)
    trainer = make(tmp_path, privacy, draws=None, max_steps=4)
    trainer._calibrate()
    trainer.engine.accountant.step(trainer.loader.mechanism(trainer.noise_multiplier), steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.privacy_report().steps == 4
    assert trainer.privacy_report().epsilon <= 3.0
    spent = make(tmp_path, privacy, draws=None, max_steps=4)
    spent._calibrate()
    spent.engine.accountant.step(spent.loader.mechanism(spent.noise_multiplier), steps=4)
    with pytest.raises(PrivacyError, match=r"4 steps have spent epsilon .* exceed 3"):
        spent.train()


def test_packed_rows_train_the_same(tmp_path):
    data = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in DATA]
    found = []
    for collator in (None, DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        trainer = make(tmp_path, data=data, data_collator=collator)
        trainer.train()
        assert trainer.engine.independence.status == "loss"
        found.append(trainer.model.state_dict())
    assert_close(*found)
    before = model_of().state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in found[0].items())


# -- what is shown ---------------------------------------------------------------------------------


def test_the_loss_is_logged_only_if_asked_for(tmp_path):
    trainer = make(tmp_path, max_grad_norm=1e-9)
    output = trainer.train()
    shown = set().union(*trainer.state.log_history)
    assert "learning_rate" in shown
    assert not {"loss", "train_loss", "grad_norm"} & shown
    assert math.isnan(output.training_loss)
    # All rows, so that nothing is padding.
    asked = make(
        tmp_path, NO_NOISE.replace(expected_batch_size=N), max_steps=1,
        draws=[torch.arange(N).numpy()], log_non_private_loss=True,
    )  # fmt: skip
    asked.train()
    expected = sum(
        float(model_of()(**{key: v[k : k + 1] for key, v in INPUTS.items()}).loss.detach())
        for k in range(N)
    )
    logged = [entry["loss"] for entry in asked.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(expected / N, rel=1e-4)]
    assert "without noise" in asked.privacy_report().to_markdown()


def test_evaluation_is_the_stock_one(tmp_path):
    trainer = make(tmp_path, eval_dataset=DATA[:4], eval_strategy="steps", eval_steps=3)
    batch = {key: value[:4] for key, value in INPUTS.items()}
    untrained = float(model_of()(**batch).loss.detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(untrained, rel=1e-5)
    trainer.train()
    expected = float(trainer.model.eval()(**batch).loss.detach())
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-1:]
    assert logged == [pytest.approx(expected, rel=1e-5)]
    assert trainer.evaluate()["eval_loss"] == logged[0]
    assert float(trainer.model(**batch).loss.detach()) == pytest.approx(logged[0], rel=1e-5)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    whole = make(tmp_path / "whole", max_steps=6)
    whole.train()
    make(tmp_path, max_steps=6, save_strategy="steps", save_steps=2).train()
    saved = json.loads((tmp_path / "checkpoint-4" / "flashdp_state.json").read_text())
    assert saved["engine"]["accountant"]["history"][0]["steps"] == 4
    assert saved["loader"]["steps_done"] == 4
    assert "key" not in str(saved)
    resumed = make(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), atol=1e-6)
    assert resumed.privacy_report().history == whole.privacy_report().history
    assert resumed.state.epoch == whole.state.epoch
    again = type(resumed.model).from_pretrained(tmp_path / "checkpoint-6")
    assert_close(again.state_dict(), whole.model.state_dict(), atol=1e-6)


def test_a_resumed_run_draws_a_fresh_key_and_must_be_the_same_run(tmp_path):
    first = make(tmp_path, NOISE, save_strategy="steps", save_steps=1)
    first.train()
    folder = tmp_path / "checkpoint-1"
    resumed = make(tmp_path / "b", NOISE)
    assert not torch.equal(resumed.engine.noise._key, first.engine.noise._key)
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.engine.accountant.steps == 3
    for privacy, data, message in (
        (NOISE.replace(noise_multiplier=0.5), DATA, r"noise_multiplier 1\.0 -> 0\.5"),
        (
            NOISE.replace(expected_batch_size=3),
            DATA,
            r"sample_rate 0\.33.* -> 0\.25.*size 4\.0 -> ",
        ),
        (NOISE.replace(sample_rate=0.5), DATA, r"sample_rate 0\.33.* -> 0\.5"),
        (NOISE, DATA[:-1], r"units 12 -> 11"),
    ):
        with pytest.raises(PrivacyError, match=message):
            make(tmp_path, privacy, data=data).train(resume_from_checkpoint=str(folder))
    (folder / "flashdp_state.json").write_text("{")
    with pytest.raises(PrivacyError, match="damaged"):
        make(tmp_path, NOISE).train(resume_from_checkpoint=str(folder))
    (folder / "flashdp_state.json").unlink()
    with pytest.raises(PrivacyError, match="without privacy"):
        make(tmp_path, NOISE).train(resume_from_checkpoint=str(folder))
    with pytest.raises(RuntimeError, match="trained already"):
        resumed.train()


# -- what must be refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"fp16": True}, "use bf16"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"gradient_accumulation_steps": 2}, "leave it at 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"torch_compile": True}, "torch_compile"),
        ({"optim": "lomo"}, "optim=lomo"),
    ],
)
def test_arguments_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **given)


def test_privacy_arguments_are_refused(tmp_path):
    for privacy, message in (
        (None, "privacy=PrivacyArguments"),
        (NOISE.replace(target_delta=None), "target_delta"),
        (NOISE.replace(accountant="rdp"), "'pld'"),
        (NOISE.replace(max_physical_batch_size=3), "max_physical_batch_size=3"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, privacy)


def test_data_without_rows_by_index_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(DATA)

    with pytest.raises(TypeError, match="no rows by index"):
        make(tmp_path, data=Stream())


def test_losses_that_couple_units_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"T5.*couples.*compute_loss_func"):
        make(tmp_path, model=tiny_model("t5"))
    model = model_of()
    forward = model.forward

    @functools.wraps(forward)
    def with_a_batch_term(**kwargs):
        out = forward(**kwargs)
        out.loss = out.loss + out.logits.square().mean()
        return out

    model.forward = with_a_batch_term
    with pytest.raises(PrivacyError, match="terms over the whole batch"):
        make(tmp_path, model=model).train()

    def mean(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    with pytest.raises(PrivacyError, match="one loss per row"):
        make(tmp_path, compute_loss_func=mean).train()


def test_a_loss_function_of_rows_is_summed(tmp_path):
    from flashdp import per_sample_loss

    def shifted(outputs, labels, num_items_in_batch=None):
        return per_sample_loss(outputs.logits[:, :-1], labels[:, 1:])

    trainer = make(tmp_path, compute_loss_func=shifted)
    trainer.train()
    assert_close(trainer.model.state_dict(), plain_loop(model_of(), 3, 4))
