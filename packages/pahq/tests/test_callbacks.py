"""Circuits that are watched while a Trainer trains."""

import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from pahq import (
    Circuit,
    CircuitCallback,
    CircuitFinder,
    Graph,
    ResumeError,
    UnsupportedModelError,
    tasks,
)
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import pairs

TASK = pairs(4, 8)
ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 96, (24, 8), generator=torch.Generator().manual_seed(3))
]


def model_of(name="gpt2"):
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1} if name == "gpt2" else {}
    return tiny_model(name, **dropout)


def circuit_for(model, count=60):
    finder = CircuitFinder(model)
    return finder.eap(TASK).top(count)


def trainer_of(model, folder, *, callbacks=None, kind=Trainer, **options):
    settings = {
        "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 2,
        "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **(settings | options))
    return kind(model, args, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=callbacks)


class Snapshots(TrainerCallback):
    """Weights at the beginning and after each step."""

    def __init__(self):
        self.of = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.of[state.global_step] = {k: v.clone() for k, v in kwargs["model"].state_dict().items()}


class Reporter(TrainerCallback):
    def __init__(self):
        self.got = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.got.append({"step": state.global_step, **logs})


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def of_circuit(rows, name="circuit"):
    found = [row for row in rows if f"{name}/kl" in row]
    return [
        {"step": row["step"]}
        | {k.split("/")[1]: v for k, v in row.items() if k.startswith(f"{name}/")}
        for row in found
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_are_those_of_the_finder_at_these_steps(name, tmp_path):
    model, weights = model_of(name), Snapshots()
    circuit = circuit_for(model)
    trainer = trainer_of(model, tmp_path, callbacks=[weights])
    watch = CircuitCallback(circuit, TASK, every=2, attribution=True, ig_steps=3, trainer=trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert [row["step"] for row in watch.history] == [0, 2, 4, 5]
    by_hand = model_of(name)
    for row in watch.history:
        by_hand.load_state_dict(weights.of[row["step"]])
        finder = CircuitFinder(by_hand)
        found = finder.evaluate(circuit, TASK)
        again = finder.eap(TASK, ig_steps=3).top(len(circuit))
        assert row == {
            "step": row["step"], "kl": found["kl"]["circuit"],
            "recovered": found["logit_diff"]["recovered"], "jaccard": again.jaccard(circuit),
        }  # fmt: skip
    assert len({row["kl"] for row in watch.history}) == 4
    assert 0 < watch.history[-1]["jaccard"] < 1
    assert of_circuit(trainer.state.log_history) == watch.history


def test_training_is_the_same_bit_for_bit(tmp_path):
    found = {}
    for watched in (False, True):
        model = model_of()
        trainer = trainer_of(model, tmp_path / str(watched))
        if watched:
            options = {"attribution": True, "trainer": trainer}
            trainer.add_callback(CircuitCallback(circuit_for(model), TASK, every=1, **options))
        trainer.train()
        logs = [
            {k: v for k, v in row.items() if not k.startswith("train_")}
            for row in trainer.state.log_history if "circuit/kl" not in row
        ]  # fmt: skip
        found[watched] = model.state_dict(), logs, torch.rand(3)
    (plain, logs, draws), (other, other_logs, other_draws) = found[False], found[True]
    assert all(torch.equal(plain[key], other[key]) for key in plain)
    assert logs == other_logs
    assert [row["step"] for row in logs if "loss" in row] == [2, 4]
    assert torch.equal(draws, other_draws)


def test_flags_and_gradients_are_left(tmp_path):
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kwargs["model"].transformer.h[0].mlp.training = False

    class Look(TrainerCallback):
        found = None

        def on_step_end(self, args, state, control, **kwargs):
            model = kwargs["model"]
            self.found = {name for name, module in model.named_modules() if not module.training}
            assert all(p.grad is None for p in model.parameters())

    model, look = model_of(), Look()
    watch = CircuitCallback(circuit_for(model), TASK, every=1, attribution=True)
    trainer_of(model, tmp_path, callbacks=[Freeze(), watch, look], max_steps=2).train()
    assert len(watch.history) == 3
    assert look.found == {"transformer.h.0.mlp"}


def test_reporters(tmp_path):
    """They are before it among the callbacks, and get what is logged through the trainer only."""
    for attached in (True, False):
        model, reporter = model_of(), Reporter()
        trainer = trainer_of(model, tmp_path, callbacks=[reporter])
        watch = CircuitCallback(
            circuit_for(model), TASK, every=3, trainer=trainer if attached else None
        )
        trainer.add_callback(watch)
        trainer.train()
        assert of_circuit(trainer.state.log_history) == watch.history
        assert of_circuit(reporter.got) == (watch.history if attached else [])
        assert all("epoch" in row for row in trainer.state.log_history)


def test_reporters_that_get_nothing_are_told_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = model_of()
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    args.report_to = ["wandb"]
    trainer = trainer_of(model, tmp_path)
    for attached in (trainer, None):
        caplog.clear()
        watch = CircuitCallback(circuit_for(model), TASK, trainer=attached)
        watch.on_train_begin(args, trainer.state, trainer.control, model=model)
        assert ("wandb will not get its values" in caplog.text) == (attached is None)


def test_what_a_trainer_has_gathered_is_left_to_it(tmp_path):
    """As TRL's, which log and forget averages of the steps since they last logged."""

    class Gathering(Trainer):
        gathered = ()

        def training_step(self, *args, **kwargs):
            self.gathered = (*self.gathered, self.state.global_step)
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            logs["gathered"] = len(self.gathered)
            self.gathered = ()
            super().log(logs, *args, **kwargs)

    model = model_of()
    trainer = trainer_of(model, tmp_path, kind=Gathering, max_steps=4)
    trainer.add_callback(CircuitCallback(circuit_for(model), TASK, every=1, trainer=trainer))
    trainer.train()
    logs = trainer.state.log_history
    assert [row["gathered"] for row in logs if "loss" in row] == [2, 2]
    assert not any("gathered" in row for row in logs if "circuit/kl" in row)


def test_a_training_that_is_stopped_early(tmp_path):
    model = model_of()
    options = {"eval_strategy": "steps", "eval_steps": 1}
    watch = CircuitCallback(circuit_for(model), TASK, every=2)
    trainer = trainer_of(model, tmp_path, callbacks=[Stop(3), watch], **options)
    for _ in range(2):
        trainer.train()
        assert [row["step"] for row in watch.history] == [0, 2, 3]


def test_resumption(tmp_path):
    """What was measured after the checkpoint is forgotten, and measured again."""
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 1}

    def run(folder, resume=None, stop=None):
        model = model_of()
        watch = CircuitCallback(circuit_for(model), TASK, every=2)
        callbacks = [Stop(stop), watch] if stop else [watch]
        trainer = trainer_of(model, folder, callbacks=callbacks, max_steps=6, **options)
        trainer.train(resume_from_checkpoint=resume)
        return watch, trainer

    whole, _ = run(tmp_path / "whole")
    stopped, _ = run(tmp_path / "parts", stop=5)
    assert [row["step"] for row in stopped.history] == [0, 2, 4, 5]
    resumed, trainer = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert resumed.history == whole.history
    assert of_circuit(trainer.state.log_history) == whole.history
    for folder in ("whole", "parts"):
        written = json.loads((tmp_path / folder / "circuit_history.json").read_text())
        assert written["history"] == whole.history
    again, _ = run(tmp_path / "parts")
    assert [row["step"] for row in again.history] == [0, 2, 4, 6]


def begin(watch, model, folder, step=3, **options):
    trainer = trainer_of(model, folder, **options)
    trainer.state.global_step = step
    watch.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    return trainer


def test_a_history_of_something_else_is_refused(tmp_path):
    model = model_of()
    circuit = circuit_for(model)
    trainer_of(model, tmp_path, callbacks=[CircuitCallback(circuit, TASK)], max_steps=1).train()
    other = {
        "circuit": (circuit.top(5), TASK, {}), "task": (circuit, pairs(4, 8, seed=1), {}),
        "ablation": (circuit, TASK, {"ablation": "zero"}),
        "ig_steps": (circuit, TASK, {"attribution": True}),
    }  # fmt: skip
    for what, (one, task, options) in other.items():
        with pytest.raises(ResumeError, match=f"circuit_history.json: expected one of {what}"):
            begin(CircuitCallback(one, task, **options), model, tmp_path)
    watch = CircuitCallback(circuit, TASK, every=7, name="another")
    begin(watch, model, tmp_path)
    assert watch.history == []
    for text in ("{", "[]", '{"history": [{"stop": 1}]}', '{"history": [3]}'):
        (tmp_path / "circuit_history.json").write_text(text)
        with pytest.raises(ResumeError, match=r"expected a history, got .* remove it"):
            begin(CircuitCallback(circuit, TASK), model, tmp_path)


def test_two_circuits(tmp_path):
    model = model_of()
    trainer = trainer_of(model, tmp_path, max_steps=1)
    circuit = circuit_for(model)
    for name, one in (("large", circuit), ("small", circuit.top(5))):
        trainer.add_callback(CircuitCallback(one, TASK, name=name, trainer=trainer))
    trainer.train()
    large, small = (of_circuit(trainer.state.log_history, name) for name in ("large", "small"))
    assert len(large) == len(small) == 2
    assert large != small
    assert sorted(path.name for path in tmp_path.glob("*_history.json")) == [
        "large_history.json", "small_history.json",
    ]  # fmt: skip


def test_a_task_without_wrong_answers_and_weights_that_are_not_finite(tmp_path):
    task = pairs(4, 8)
    task.wrong_answers = None
    model = model_of()
    watch = CircuitCallback(circuit_for(model), task, attribution=True)
    begin(watch, model, tmp_path, step=0)
    assert watch.history[0].keys() == {"step", "kl", "jaccard"}
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(float("nan"))
    trainer = trainer_of(model, tmp_path)
    trainer.state.global_step, trainer.control.should_training_stop = 1, True
    watch.on_step_end(trainer.args, trainer.state, trainer.control, model=model)
    assert math.isnan(watch.history[1]["kl"])
    assert math.isnan(watch.history[1]["jaccard"])
    written = json.loads((tmp_path / "circuit_history.json").read_text(), parse_constant=int)
    assert written["history"][1] == {"step": 1, "kl": None, "jaccard": None}
    again = CircuitCallback(watch.circuit, task, attribution=True)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(0.1)
    begin(again, model, tmp_path, step=1)
    assert math.isnan(again.history[1]["kl"])


def test_only_the_main_process_measures(tmp_path):
    model = model_of()
    watch = CircuitCallback(circuit_for(model), TASK, every=1)
    trainer = trainer_of(model, tmp_path)
    trainer.state.is_world_process_zero = False
    trainer.control.should_training_stop = True
    for event in (watch.on_train_begin, watch.on_step_end, watch.on_epoch_end):
        event(trainer.args, trainer.state, trainer.control, model=model)
    assert watch.history == trainer.state.log_history == []
    assert not [*tmp_path.glob("*.json")]


def test_mixed_precision(tmp_path):
    """The weights stay those of float32, and are what is measured."""
    model, weights = model_of("llama"), Snapshots()
    circuit = circuit_for(model)
    watch = CircuitCallback(circuit, TASK, every=1)
    trainer_of(model, tmp_path, callbacks=[weights, watch], max_steps=1, bf16=True).train()
    by_hand = model_of("llama")
    by_hand.load_state_dict(weights.of[1])
    found = CircuitFinder(by_hand).evaluate(circuit, TASK)
    assert watch.history[1]["kl"] == found["kl"]["circuit"]


def test_keys_of_their_own(tmp_path):
    model = model_of("llama")
    circuit = CircuitFinder(model, kv="per_query_head").eap(TASK).top(60)
    watch = CircuitCallback(circuit, TASK)
    begin(watch, model, tmp_path, step=0)
    found = CircuitFinder(model, kv="per_query_head").evaluate(circuit, TASK)
    assert watch.history[0]["kl"] == found["kl"]["circuit"]


def test_wrappers(tmp_path):
    model = model_of()
    watch = CircuitCallback(circuit_for(model), TASK)
    begin(watch, model, tmp_path, step=0)

    def backend(*_):
        raise AssertionError("nothing is compiled for a measurement")

    for wrapper in (nn.DataParallel(model), torch.compile(model, backend=backend)):
        other = CircuitCallback(watch.circuit, TASK)
        other.on_train_begin(*arguments(tmp_path), model=wrapper)
        assert other.history == watch.history


def arguments(folder):
    trainer = trainer_of(model_of(), folder)
    return trainer.args, trainer.state, trainer.control


def test_sharded_weights_are_refused(tmp_path):
    model = model_of()
    watch = CircuitCallback(circuit_for(model), TASK)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(UnsupportedModelError, match=r"got transformer\.wte\.weight sharded"):
        watch.on_train_begin(*arguments(tmp_path), model=model)


def test_fsdp_is_refused(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    watch = CircuitCallback(circuit_for(model_of()), TASK)
    settings = arguments(tmp_path)
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        second = fsdp.fully_shard(model_of(), mesh=mesh)
        first = fsdp.FullyShardedDataParallel(model_of(), device_id=torch.device("cpu"))
        for model in (first, second):
            with pytest.raises(
                UnsupportedModelError, match=r"whole on every process, got .* shard"
            ):
                watch.on_train_begin(*settings, model=model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.peer
def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    settings = arguments(tmp_path)
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    plain = model_of("llama")
    watch = CircuitCallback(circuit_for(plain), TASK)
    wrapped = peft.get_peft_model(model_of("llama"), lora)
    injected = model_of("llama")
    injected.add_adapter(lora)
    for model in (wrapped, injected):
        with pytest.raises(
            UnsupportedModelError, match=r"without adapters, got .* merge_and_unload"
        ):
            watch.on_train_begin(*settings, model=model)
    watch.on_train_begin(*settings, model=wrapped.merge_and_unload())
    assert len(watch.history) == 1


@pytest.mark.peer
def test_trl(tmp_path):
    """Whose averages are logged with the loss, and not with what is measured."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS])
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=2,
        save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    logs = {}
    for watched in (False, True):
        model = model_of("llama")
        trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=words)
        if watched:
            watch = CircuitCallback(circuit_for(model), TASK, every=1, trainer=trainer)
            trainer.add_callback(watch)
        trainer.train()
        logs[watched] = [row for row in trainer.state.log_history if "loss" in row]
    assert len(watch.history) == 5
    assert len(logs[True]) == 2
    assert logs[True] == logs[False]
    assert "mean_token_accuracy" in logs[True][0]
    assert of_circuit(trainer.state.log_history) == watch.history


def test_a_model_that_unlearns_a_task(tmp_path):
    """SmolLM2 is taught to name who gives; the circuit of naming the other is less and less its."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    task = tasks.ioi(tokenizer, 4)
    circuit = CircuitFinder(model).eap(task).top(4000)
    labels = torch.full_like(task.clean, -100)
    ids = torch.cat([task.clean, task.wrong_answers[:, None]], 1)
    labels = torch.cat([labels, task.wrong_answers[:, None]], 1)
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01,
        optim="sgd", lr_scheduler_type="constant", save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    watch = CircuitCallback(circuit, task, every=1)
    Trainer(model, args, train_dataset=rows, callbacks=[watch]).train()
    found = CircuitFinder(model.eval()).evaluate(circuit, task)
    recovered = [row["recovered"] for row in watch.history]
    assert recovered == sorted(recovered, reverse=True)
    assert watch.history[-1] == {
        "step": 2, "kl": found["kl"]["circuit"], "recovered": found["logit_diff"]["recovered"],
    }  # fmt: skip


def test_bad_input(tmp_path):
    model = model_of()
    circuit = circuit_for(model)
    with pytest.raises(TypeError, match="circuit: expected a Circuit, got Task"):
        CircuitCallback(TASK, circuit)
    for options, text in (
        ({"every": 0}, "every: expected an integer"),
        ({"ig_steps": 0}, "ig_steps: expected an integer"),
        ({"ablation": "noise"}, "ablation: expected one of"),
        ({"name": "a/b"}, "name: expected letters"),
    ):
        with pytest.raises(ValueError, match=text):
            CircuitCallback(circuit, TASK, **options)
    graph = Graph(1, 2, 2)
    small = torch.zeros(graph.senders, graph.receivers)
    with pytest.raises(ValueError, match="circuit: expected edges of Graph"):
        begin(CircuitCallback(Circuit(graph, small, small), TASK), model, tmp_path)
