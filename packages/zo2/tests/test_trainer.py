"""The trainer against the engine's own loop, the stock trainer's habits, and an unbroken run."""

import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import zo2
from shared_kernels.testing.models import tiny_inputs, tiny_model
from transformers import TrainerCallback, TrainingArguments
from zo2 import OffloadConfig, UpdateLog, ZOConfig, ZOOptimizer, ZOTrainer

LAYERS = {"num_hidden_layers": 2}
STREAMED = OffloadConfig(prefetch=1)
ZO = ZOConfig(seed=3, eps=1e-2)


def dataset(count=16, *, length=8, name="llama"):
    inputs = tiny_inputs(name, batch=count, length=length)
    if name == "llama":
        # Examples count differently, or the weighting by tokens would not show.
        for k in range(count):
            inputs["labels"][k, : k % 4] = -100
        inputs["labels"][1] = -100
    return [{key: value[k] for key, value in inputs.items()} for k in range(count)]


DATA = dataset()


def arguments(folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(**defaults | kwargs)


def make(folder, *, model=None, zo=ZO, offload=STREAMED, data=DATA, callbacks=None, **kwargs):
    extra = {k: kwargs.pop(k) for k in ("eval_dataset", "compute_loss_func", "log") if k in kwargs}
    if model is None:
        model = tiny_model("llama", **LAYERS)
    return ZOTrainer(
        model, arguments(folder, **kwargs), zo=zo, offload=offload, train_dataset=data,
        callbacks=callbacks, **extra,
    )  # fmt: skip


def records(path):
    with UpdateLog.open(path) as log:
        assert log.verify().ok
        return log.records.copy()


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# -- equal to the engine's loop --------------------------------------------------------------------


def batches_of(trainer):
    """The batches that the trainer saw, from a loader of the same seed."""
    loader = trainer.get_train_dataloader()
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("offload", [None, STREAMED], ids=["resident", "streamed"])
def test_three_lines_equal_the_engines_loop_bit_for_bit(tmp_path, offload):
    zo = ZOConfig(seed=3, weight_decay=0.1, q=2)
    trainer = make(tmp_path, zo=zo, offload=offload, lr_scheduler_type="linear", max_steps=6)
    trainer.train()
    seen = list(itertools.islice(batches_of(trainer), 6))
    engine = zo2.prepare(tiny_model("llama", **LAYERS), zo, offload, log=tmp_path / "own.zolog")
    losses, norms = [], []
    for t, batch in enumerate(seen):
        step = engine.step(batch, lr=1e-3 * (6 - t) / 6)
        losses.append(step.loss.item())
        norms.append(step.g.abs().mean().item())
    assert_same_weights(trainer.engine.state_dict(), engine.state_dict())
    engine.close()
    assert (tmp_path / "own.zolog").read_bytes() == (tmp_path / "run.zolog").read_bytes()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["loss"] for entry in logged] == losses
    assert [entry["grad_norm"] for entry in logged] == norms


def test_the_log_holds_the_schedule_and_decay_of_the_arguments(tmp_path):
    trainer = make(tmp_path, lr_scheduler_type="cosine", weight_decay=0.25, max_steps=5,
                   warmup_steps=2)  # fmt: skip
    trainer.train()
    rows = records(tmp_path / "run.zolog")
    ramp = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert rows["lr"].tolist() == pytest.approx([1e-3 * r for r in ramp], rel=1e-6)
    assert set(rows["weight_decay"].tolist()) == {0.25}
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged == pytest.approx(rows["lr"].tolist(), rel=1e-6)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 and .*weight_decay=0\.25 differ"):
        make(tmp_path / "b", zo=ZOConfig(weight_decay=0.1), weight_decay=0.25).train()


def estimates(trainer, steps):
    trainer.train()
    return records(trainer.log_path)["g"][:steps, 0]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_accumulation_and_micro_batches_equal_the_big_batch(tmp_path, name):
    """Llama divides by the labels of the whole batch, Bert by rows; one update in float64."""
    layers = LAYERS if name == "llama" else {"num_hidden_layers": 2}
    data = dataset(8, name=name)
    found = {}
    for key, size, accumulate, micro in (
        ("whole", 8, 1, None), ("accumulated", 2, 4, None), ("micro", 8, 1, 2), ("both", 4, 2, 1)
    ):  # fmt: skip
        trainer = make(
            tmp_path / key,
            model=tiny_model(name, dtype=torch.float32, **layers),
            zo=ZO.replace(micro_batch_size=micro),
            data=data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
        )
        g = estimates(trainer, 2)
        history = [e["loss"] for e in trainer.state.log_history if "grad_norm" in e]
        found[key] = (g, history)
        assert trainer.engine.global_step == 2
    for g, history in found.values():
        # A loss is a few units in float32, so g is good to 1e-7 / (2 eps) = 1e-5 times a few.
        assert g.tolist() == pytest.approx(found["whole"][0].tolist(), abs=2e-4)
        assert history == pytest.approx(found["whole"][1], rel=1e-5)
    assert abs(found["whole"][0]).min() > 1e-2


def test_max_grad_norm_and_the_filter_touch_nothing(tmp_path):
    results = []
    for key, extra in {
        "a": {"max_grad_norm": 0.0},
        "b": {"max_grad_norm": 1e-9, "logging_nan_inf_filter": False},
    }.items():
        trainer = make(tmp_path / key, **extra)
        trainer.train()
        results.append(trainer.engine.state_dict())
        assert all(p.grad is None for p in trainer.model.parameters())
    assert_same_weights(*results)


def test_non_finite_losses_are_filtered_from_the_report_and_skipped(tmp_path):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        # Step 1 (calls 2 and 3) has no finite loss.
        return outputs.logits.float().square().mean() / (0 if len(calls) in (3, 4) else 1)

    trainer = make(tmp_path, compute_loss_func=loss, max_steps=3)
    trainer.train()
    rows = records(tmp_path / "run.zolog")
    assert [int(f) for f in rows["flags"]] == [0, 1, 0]
    logged = [e["loss"] for e in trainer.state.log_history if "grad_norm" in e]
    assert len(logged) == 3
    assert all(math.isfinite(x) for x in logged)


def test_half_precision_under_autocast(tmp_path):
    """Autocast caches casts by parameter; both signs must still see their own weights."""
    trainer = make(tmp_path / "a", bf16=True, max_steps=1)
    g = estimates(trainer, 1)
    again = make(tmp_path / "b", bf16=True, max_steps=1, offload=None)
    assert estimates(again, 1) == g

    engine, batch = zo2.prepare(tiny_model("llama", **LAYERS), ZO, STREAMED), tiny_inputs("llama")
    found = []
    for cache in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            found.append(engine.estimate(batch).g.item())
    assert found[0] == found[1]


# -- evaluation and saving -------------------------------------------------------------------------


def test_evaluation_during_training_changes_nothing_and_is_current(tmp_path):
    plain = make(tmp_path / "plain")
    plain.train()
    seen = {}

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            weights = trainer.engine.state_dict()
            twin = tiny_model("llama", **LAYERS)
            twin.load_state_dict(weights)
            seen[state.global_step] = metrics["eval_loss"], twin

    held_out = dataset(4, length=6)
    trainer = make(
        tmp_path / "evaluated",
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        callbacks=[Look()],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert_same_weights(trainer.engine.state_dict(), plain.engine.state_dict())
    batch = {k: torch.stack([row[k] for row in held_out]) for k in held_out[0]}
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[0][0] == before
    for loss, twin in seen.values():
        with torch.no_grad():
            assert twin(**batch).loss.item() == pytest.approx(loss, rel=1e-6)
    assert len({loss for loss, _ in seen.values()}) == 5
    assert trainer.predict(held_out).metrics["test_loss"] == seen[4][0]


def test_save_model_gives_a_folder_transformers_loads(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, trainer.model(**inputs).loss)
    replayed = zo2.replay(tiny_model("llama", **LAYERS), trainer.log_path, progress=False)
    assert_same_weights(loaded.state_dict(), replayed.state_dict())


def test_checkpoints_are_kilobytes_until_the_last(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    trainer.train()
    weights = sum(p.numel() * 4 for p in tiny_model("llama", **LAYERS).parameters())
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        assert len(records(folder / "run.zolog")) == step
        assert (folder / "trainer_state.json").exists()
        size = sum(f.stat().st_size for f in folder.iterdir())
        assert (folder / "model.safetensors").exists() == (step == 3)
        assert step == 3 or size < 40_000 < weights
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert_same_weights(saved.state_dict(), trainer.engine.state_dict())


def test_save_only_model_saves_weights_every_time(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=1, save_only_model=True, max_steps=2).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_best_model_is_in_hand_at_the_end(tmp_path, dtype):
    # Each rate is worse than the last, so the first checkpoint is the best.
    trainer = make(
        tmp_path,
        model=tiny_model("llama", dtype=dtype, **LAYERS),
        eval_dataset=dataset(4),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
        max_steps=3,
        save_total_limit=1,
    )
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=dtype)
    assert_same_weights(trainer.engine.state_dict(), best.state_dict())
    twin, inputs = tiny_model("llama", dtype=dtype, **LAYERS), tiny_inputs("llama")
    twin.load_state_dict(best.state_dict())
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**inputs).loss, twin(**inputs).loss)
    # Base and log are still the model, and nothing can be appended that would not be.
    assert len(records(tmp_path / "run.zolog")) == 1
    replayed = zo2.replay(
        tiny_model("llama", dtype=dtype, **LAYERS), tmp_path / "run.zolog", progress=False
    )
    assert_same_weights(replayed.state_dict(), best.state_dict())
    with pytest.raises(RuntimeError, match="prepare it anew"):
        trainer.train()


# -- resuming --------------------------------------------------------------------------------------


RUNS = {
    "fp32": (torch.float32, OffloadConfig(store="fp32", prefetch=1)),
    "bf16x2": (torch.bfloat16, OffloadConfig(store="bf16x2", fold_every=3, prefetch=1)),
    "bf16": (torch.bfloat16, OffloadConfig(store="bf16", fold_every=3, prefetch=1)),
}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("key", RUNS)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, key):
    dtype, offload = RUNS[key]

    def trainer(folder, **kwargs):
        return make(
            tmp_path / folder, model=tiny_model("llama", dtype=dtype, **LAYERS), offload=offload,
            save_strategy="steps", save_steps=3, max_steps=10, lr_scheduler_type="linear", **kwargs,
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    broken = trainer("broken", callbacks=[Stop(8)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert len(records(tmp_path / "broken" / "run.zolog")) == 8
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert_same_weights(
        resumed.engine.state_dict(dtype=torch.float32), whole.engine.state_dict(dtype=torch.float32)
    )
    logs = [(tmp_path / name / "run.zolog").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]
    losses = [
        [e["loss"] for e in t.state.log_history if "grad_norm" in e] for t in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_train_again_goes_on_where_it_was(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.engine.global_step == 4
    rows = records(tmp_path / "run.zolog")
    assert rows["step"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"holds no run\.zolog"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_the_log_of_an_earlier_run_is_kept(tmp_path, caplog):
    for k in range(3):
        with caplog.at_level(logging.WARNING):
            make(tmp_path, max_steps=k + 1).train()
    assert "an earlier run's log is kept as run.2.zolog" in caplog.text
    lengths = [len(records(tmp_path / f"run{x}.zolog")) for x in (".1", ".2", "")]
    assert lengths == [1, 2, 3]


def test_resuming_needs_the_same_base_and_an_untouched_trainer(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = make(tmp_path, model=tiny_model("llama", seed=9, **LAYERS))
    with pytest.raises(zo2.LogError, match="differs in value"):
        other.train(resume_from_checkpoint=checkpoint)
    assert len(records(tmp_path / "run.zolog")) == 4
    used = make(tmp_path / "used", max_steps=1)
    used.train()
    with pytest.raises(RuntimeError, match="taken 1 steps already"):
        used.train(resume_from_checkpoint=checkpoint)
    # A checkpoint moved elsewhere brings its log along.
    shutil.copytree(checkpoint, tmp_path / "moved" / "checkpoint-2")
    moved = make(tmp_path / "moved")
    moved.train(resume_from_checkpoint=True)
    assert (tmp_path / "moved" / "run.zolog").read_bytes() == (tmp_path / "run.zolog").read_bytes()


# -- adapters, engines, optimizers -----------------------------------------------------------------


@pytest.mark.peer
def test_adapters_of_peft_train_save_resume_and_reload_the_best(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama", **LAYERS), config)

    def trainer(**kwargs):
        return make(
            tmp_path, model=model(), eval_dataset=dataset(4), eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, **kwargs,
        )  # fmt: skip

    trained = trainer()
    trained.train()
    final = trained.engine.state_dict()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.engine.state_dict(), final)
    best = trainer(
        load_best_model_at_end=True, metric_for_best_model="step", greater_is_better=False
    )
    best.compute_metrics = lambda _: {"step": best.state.global_step}
    best.train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / "adapter_model.safetensors").stat().st_size < 20_000
    inputs = tiny_inputs("llama")
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", **LAYERS), folder).eval()
    with torch.no_grad():
        expected = loaded(**inputs).loss
        assert torch.equal(best.model.eval()(**inputs).loss, expected)
        assert not torch.equal(resumed.model.eval()(**inputs).loss, expected)


def test_a_prepared_engine_can_be_trained(tmp_path):
    engine = zo2.prepare(tiny_model("llama", **LAYERS), ZO, STREAMED, device="cpu")
    trainer = ZOTrainer(engine, arguments(tmp_path / "a"), train_dataset=DATA)
    trainer.train()
    plain = make(tmp_path / "b")
    plain.train()
    assert_same_weights(engine.state_dict(), plain.engine.state_dict())
    with pytest.raises(ValueError, match="has its zo and offload"):
        ZOTrainer(engine, arguments(tmp_path), zo=ZO)
    logged = zo2.prepare(tiny_model("llama", **LAYERS), log=tmp_path / "x.zolog", device="cpu")
    with pytest.raises(ValueError, match="without a log"):
        ZOTrainer(logged, arguments(tmp_path))


def test_the_optimizer_follows_a_schedule_of_transformers(tmp_path):
    engine = zo2.prepare(tiny_model("llama", **LAYERS), ZO, log=tmp_path / "a.zolog")
    optimizer = ZOOptimizer(engine, lr=1e-2)
    schedule = transformers.get_scheduler("linear", optimizer, 0, 4)
    batch = tiny_inputs("llama")
    for _ in range(2):
        optimizer.accumulate(engine.estimate(batch).scaled(0.25))
        optimizer.accumulate(engine.estimate(batch).scaled(0.75))
        optimizer.step()
        schedule.step()
    engine.close()
    rows = records(tmp_path / "a.zolog")
    assert rows["lr"].tolist() == pytest.approx([1e-2, 7.5e-3])
    with pytest.raises(RuntimeError, match="accumulate"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": []})
    optimizer.zero_grad()
    assert optimizer.state_dict()["state"] == {}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"auto_find_batch_size": True}, "micro_batch_size"),
        ({"bf16_full_eval": True}, "load the model in that dtype"),
        ({"torch_compile": True}, "torch_compile"),
        ({"use_liger_kernel": True}, "Liger"),
        ({"neftune_noise_alpha": 5.0}, "train_mode=True"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(tmp_path, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **kwargs)


def test_several_gpus_optimizers_and_wrapped_models_are_refused(tmp_path, monkeypatch):
    args, model = arguments(tmp_path), tiny_model("llama", **LAYERS)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        ZOTrainer(model, args)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="give no optimizer"):
        ZOTrainer(model, arguments(tmp_path), optimizers=(sgd, None))
    with pytest.raises(ValueError, match="model_init"):
        ZOTrainer(None, arguments(tmp_path), model_init=lambda: model)
    with pytest.raises(ValueError, match="DataParallel copies the model"):
        ZOTrainer(torch.nn.DataParallel(model), arguments(tmp_path))
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantization_config"):
        ZOTrainer(model, arguments(tmp_path))


def test_the_default_learning_rate_is_warned_about(tmp_path, caplog):
    make(tmp_path, learning_rate=5e-5)
    assert "meant for gradients" in caplog.text
    caplog.clear()
    make(tmp_path, learning_rate=1e-6)
    assert "meant for gradients" not in caplog.text


def test_the_arguments_given_are_left_as_they_were(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True)
    before = json.dumps(args.to_dict(), default=str)
    trainer = ZOTrainer(tiny_model("llama", **LAYERS), args, zo=ZO, train_dataset=DATA)
    trainer.train()
    assert json.dumps(args.to_dict(), default=str) == before


def test_the_three_lines_of_the_readme_run(tmp_path):
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names = {
        "model": tiny_model("llama", **LAYERS),
        "args": arguments(tmp_path),
        "dataset": DATA,
    }
    exec(code, names)
    assert names["trainer"].engine.global_step == 4
    assert names["trainer"].engine.offload == OffloadConfig(gpu="8GiB")
