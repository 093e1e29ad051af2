"""Runs of a trainer that are recorded: three lines, and the numbers of a loop."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from sam_if import (
    SAMConfig,
    SAMTrainer,
    Trajectory,
    TrajectoryError,
    attribute,
    causal_lm,
    classification,
)
from sam_if.attribution import field_of, opened
from sam_if.recording import SAMPLE, Numbered, NumberedCollator, objective_for
from shared_kernels.testing.models import tiny_model
from torch.func import grad
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

SAMPLES = 10


def texts(count=SAMPLES, seed=0):
    draws = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 60, (6,), generator=draws)
        labels = ids.clone()
        labels[: number % 4] = -100
        rows.append({"input_ids": ids, "labels": labels, "of no use": number})
    return rows


def language_model(seed=0, **config):
    torch.manual_seed(seed)
    model = tiny_model("llama", **config)
    model.config._attn_implementation = "eager"
    return model


def trainer(folder, *, model=None, data=None, record=True, sam=None, **options):
    given = {
        "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "cosine", "max_steps": 5,
        "per_device_train_batch_size": 3, "seed": 3, "weight_decay": 0.01, "max_grad_norm": 1.0,
    }  # fmt: skip
    more = {name: options.pop(name) for name in ("objective", "storage", "compute_loss_func",
                                                 "eval_dataset") if name in options}  # fmt: skip
    args = TrainingArguments(
        str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        **{"save_strategy": "no", **given, **options},
    )  # fmt: skip
    return SAMTrainer(
        model or language_model(), args, train_dataset=texts() if data is None else data,
        sam=sam or SAMConfig(rho=0.1), record=folder / "run" if record else None, **more,
    )  # fmt: skip


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


QUERIES = texts(3, seed=9)


@pytest.mark.parametrize("storage", ["all", "sqrt"])
@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2}, {"optim": "adamw_torch", "learning_rate": 1e-3},
])  # fmt: skip
def test_three_lines(options, storage, tmp_path):
    made = trainer(tmp_path, storage=storage, **options)
    made.train()
    scores = made.attribute(QUERIES)
    plain = trainer(tmp_path, record=False, **options)
    plain.train()
    # the same training, and losses as they are logged
    torch.testing.assert_close(weights(made.model), weights(plain.model), rtol=2e-4, atol=2e-6)
    told, wanted = ([log["loss"] for log in one.state.log_history if "loss" in log]
                    for one in (made, plain))  # fmt: skip
    assert told == pytest.approx(wanted, rel=1e-4)
    # what is on the disk is enough
    batches = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]}
               for row in QUERIES]  # fmt: skip
    found = attribute(tmp_path / "run", batches)
    torch.testing.assert_close(found.values, scores.values, rtol=1e-4, atol=1e-7)
    assert scores.values.shape == (3, SAMPLES)
    run = opened(tmp_path / "run")
    assert torch.equal(run.weights, weights(made.model))
    assert run.check() < 1e-3
    assert torch.equal(run.retrain([]), run.weights)
    # numbers are those of rows
    rows = texts()
    for index, record in enumerate(run.records):
        assert sum(len(own) for own in record.samples) <= 6
        for own, batch in zip(record.samples, run.batches(index), strict=True):
            assert batch.keys() == {"input_ids", "labels"}
            for number, ids in zip(own, batch["input_ids"], strict=True):
                assert torch.equal(ids, rows[number]["input_ids"])
    assert all(torch.equal(a["input_ids"], b["input_ids"])
               for a, b in zip(made.train_dataset, rows, strict=True))  # fmt: skip


def classifier(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=4, max_position_embeddings=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).to(dtype)


def labelled(count=SAMPLES, seed=0):
    return [{"input_ids": row["input_ids"] % 20, "labels": n % 3}
            for n, row in enumerate(texts(count, seed))]  # fmt: skip


def batch_of(rows):
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows])}  # fmt: skip


def test_scores_are_differences_of_runs(tmp_path):
    """In float64, where a difference can be seen."""
    made = trainer(tmp_path, model=classifier(torch.float64), data=labelled(),
                   gradient_accumulation_steps=2)  # fmt: skip
    made.train()
    query = labelled(3, seed=9)
    found = made.attribute(query, mean=True).values[0]
    run = opened(tmp_path / "run", made.model)
    sample, measured = int(run.records[0].samples[0][0]), []
    for change in (1e-4, -1e-4):
        bumped = torch.ones(SAMPLES, dtype=torch.float64)
        bumped[sample] += change
        optimizer = run._begun(run._snapshot(0, run.records[0].weights), run.records[0])
        for index in range(len(run)):
            run._again(optimizer, index, run.batches(index), bumped)
        with torch.no_grad():
            measured.append(run.vector.losses(run.vector.read(), batch_of(query)).mean())
    wanted = -float(measured[0] - measured[1]) / 2e-4
    assert float(found[sample]) == pytest.approx(wanted, rel=1e-5)


def test_columns_and_datasets(tmp_path):
    """A dataset of datasets, columns that the model does not take, and sampling by length."""
    rows = [{"input_ids": row["input_ids"].tolist(), "note": str(n)}
            for n, row in enumerate(texts())]  # fmt: skip

    class Tokenizer:
        pad_token_id, pad_token, mask_token, chat_template = 0, "<pad>", None, None
        model_input_names = ("input_ids",)
        padding_side = "right"

        def pad(self, features, **kwargs):
            return {"input_ids": torch.tensor([list(f["input_ids"]) for f in features])}

    for data in (Dataset.from_list(rows), rows):
        folder = tmp_path / type(data).__name__
        made = trainer(folder, data=data, max_steps=2, train_sampling_strategy="group_by_length")
        made.data_collator = DataCollatorForLanguageModeling(Tokenizer(), mlm=False)
        made.train()
        run = opened(folder / "run", made.model)
        for index, record in enumerate(run.records):
            for number, ids in zip(record.samples[0], run.batches(index)[0]["input_ids"],
                                   strict=True):  # fmt: skip
                assert ids.tolist() == list(rows[number]["input_ids"])


def test_classifiers(tmp_path):
    rows = labelled()
    made = trainer(tmp_path, model=classifier(), data=rows, label_smoothing_factor=0.1)
    made.train()
    assert made.recorder.objective.spec["label_smoothing"] == 0.1
    scores = made.attribute(rows[:2])
    assert scores.values.shape == (2, SAMPLES)
    assert (scores.values != 0).all()
    run = opened(tmp_path / "run")
    assert type(run.model) is BertForSequenceClassification
    assert run.check() < 1e-3


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    base = language_model()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    made = trainer(tmp_path, model=model)
    made.train()
    scores = made.attribute(QUERIES)
    assert all("lora" in name for name in opened(tmp_path / "run", model).vector.names)
    batches = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]}
               for row in QUERIES]  # fmt: skip
    found = attribute(tmp_path / "run", batches)
    torch.testing.assert_close(found.values, scores.values, rtol=1e-4, atol=1e-7)


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path, **options)

    class Stop(Exception):
        pass

    step = first.training_step

    def stopping(*args, **kwargs):
        if first.state.global_step == 3:
            raise Stop
        return step(*args, **kwargs)

    first.training_step = stopping
    with pytest.raises(Stop):
        first.train()
    again = trainer(tmp_path, model=language_model(seed=8), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))
    run = opened(tmp_path / "run", again.model)
    assert len(run) == 6
    assert torch.equal(again.attribute(QUERIES).values, whole.attribute(QUERIES).values)
    # a run that is there is not written over
    with pytest.raises(FileExistsError, match="choose another folder"):
        trainer(tmp_path).train()
    with pytest.raises(TrajectoryError, match="step 2: the model's weights are not those"):
        Trajectory.resume(tmp_path / "run", again.model, again.sam_optimizer, at=2)


def test_the_end_is_that_of_training_not_the_best_model(tmp_path):
    made = trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, learning_rate=3.0, eval_dataset=QUERIES,
        metric_for_best_model="loss",
    )  # fmt: skip
    made.train()
    assert made.state.best_model_checkpoint
    run = opened(tmp_path / "run", made.model)
    assert torch.equal(run.retrain([]), run.weights)
    assert not torch.equal(run.weights, weights(made.model))


class Net(torch.nn.Module):
    """A model that is none of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)
        self.double()

    def forward(self, x, labels=None):
        return self.last(torch.tanh(self.first(x)))


def vectors(count=SAMPLES, seed=0):
    return [{"x": row["input_ids"] / 30 - 1.0, "labels": n % 3}
            for n, row in enumerate(texts(count, seed))]  # fmt: skip


def test_the_closed_form_of_a_run(tmp_path):
    """Its field is that of the last epoch, with a decay for each parameter."""

    def trained(folder, **options):
        data = [{**row, "x": row["x"].double()} for row in vectors()]
        made = trainer(folder, model=Net(), data=data, objective=classification(),
                       **{"max_steps": 4, "per_device_train_batch_size": 5, "weight_decay": 0.1,
                          **options})  # fmt: skip
        made.train()
        return made

    made = trained(tmp_path)
    run = opened(tmp_path / "run", made.model)
    before = run.vector.read()
    field, numbers = field_of(run)
    assert sorted(numbers.tolist()) == list(range(SAMPLES))
    assert len(field.groups) == 2
    decay = field.weight_decay
    assert {round(float(d), 6) for d in decay.unique()} == {0.0, 0.1}
    begin = sum(run.vector.sizes[: run.vector.names.index("last.bias")])
    assert (decay[begin : begin + 3] == 0).all()
    assert field.rho == 0.1
    rows = vectors(2, seed=9)
    query = [{"x": torch.stack([row["x"] for row in rows]).double(),
              "labels": torch.tensor([row["labels"] for row in rows])}]  # fmt: skip
    found = attribute(run, query, method="hessian", damping=0.2)
    y = torch.linalg.solve(
        field.dense().T + 0.2 * torch.eye(len(field), dtype=torch.float64),
        grad(lambda w: run.vector.losses(w, query[0])[1])(run.weights),
    )
    wanted = torch.zeros(SAMPLES, dtype=torch.float64)
    wanted[numbers] = field.source_dots(y)
    torch.testing.assert_close(found.values[1], wanted, rtol=1e-8, atol=1e-12)
    assert not found.reliable
    assert any("no fixed point" in text for text in found.warnings)
    assert torch.equal(run.vector.read(), before)
    # factors know one decay
    with pytest.raises(ValueError, match="field: expected one weight decay"):
        attribute(run, query, method="hessian", solver="ekfac")
    # steps that are no epoch have none
    with pytest.raises(TrajectoryError, match="the last steps do not have every sample once"):
        trained(tmp_path / "short", per_device_train_batch_size=3, max_steps=5).attribute(
            vectors(2), method="hessian"
        )
    with pytest.raises(ValueError, match="AdamW with weight decay comes to rest"):
        trained(tmp_path / "adam", optim="adamw_torch").attribute(vectors(2), method="hessian")


def test_a_full_disk_is_known_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    made = trainer(tmp_path, model=classifier(), data=labelled())
    before = weights(made.model).clone()
    with pytest.raises(MemoryError, match="of disk, and there are 1000 B"):
        made.train()
    assert torch.equal(weights(made.model), before)
    # nothing is in the way of another try
    monkeypatch.undo()
    trainer(tmp_path, model=classifier(), data=labelled()).train()


def test_objectives():
    assert objective_for(language_model()).spec["level"] == "token"
    config = BertConfig(num_labels=1, hidden_size=8, num_attention_heads=2, num_hidden_layers=1,
                        intermediate_size=8, vocab_size=20)  # fmt: skip
    model = BertForSequenceClassification(config)
    assert objective_for(model).spec["name"] == "regression"
    model.config.problem_type = "multi_label_classification"
    for wrong, smoothing in ((model, 0.0), (language_model(), 0.1), (torch.nn.Linear(2, 2), 0.0)):
        with pytest.raises(ValueError, match="model: expected"):
            objective_for(wrong, smoothing)


def test_rows_have_numbers():
    class Pairs:
        def __len__(self):
            return 3

        def __getitem__(self, n):
            return (n, n + 1)

    rows = [Numbered(Pairs())[n] for n in (2, np.int64(0))]
    batch = NumberedCollator(lambda pairs: {"x": torch.tensor(pairs)})(rows)
    assert batch["x"].tolist() == [[2, 3], [0, 1]]
    assert batch[SAMPLE].tolist() == [2, 0]
    with pytest.raises(ValueError, match="train_dataset: expected one with a length"):
        Numbered(iter([1]))


def test_what_is_refused(tmp_path):
    for options, match in (
        ({"bf16": True}, "no mixed precision, got str 'bf16'"),
        ({"torch_compile": True}, "torch_compile: expected False"),
        ({"optim": "adafactor"}, "optim: expected adamw_torch or sgd"),
        ({"sam": SAMConfig(scope="per_microbatch"), "gradient_accumulation_steps": 2},
         "sam: expected scope='global'"),
        ({"compute_loss_func": lambda *a, **k: None}, "objective: expected that of compute"),
        ({"sam": SAMConfig(perturb_decay=True)}, "sam: expected perturb_decay=False"),
        ({"storage": "log"}, "storage: expected one of all, sqrt"),
        ({"model": tiny_model("llama")}, "attn_implementation='eager'"),
        ({"model": language_model().bfloat16()}, "model: expected float32 or float64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="objective: expected None without record"):
        trainer(tmp_path, record=False, objective=causal_lm())
    with pytest.raises(RuntimeError, match="the run was not recorded"):
        trainer(tmp_path, record=False).attribute(QUERIES)
    with pytest.raises(ValueError, match="method: expected one of trajectory, frozen, gif, hes"):
        attribute(tmp_path, [], method="magic")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model was kept beside the run; give model="):
        attribute(tmp_path / "empty", [])
    place = tmp_path / "bad" / "model"
    place.mkdir(parents=True)
    (place / "class.json").write_text(json.dumps({"name": "os"}))
    with pytest.raises(ValueError, match="folder: expected a model of transformers, got str 'os'"):
        attribute(tmp_path / "bad", [])
