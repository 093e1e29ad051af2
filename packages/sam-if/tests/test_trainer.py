"""Trainers that take the steps of SAM, beside loops that are written out."""

import copy
import gc
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from sam_if import SAM
from sam_if.config import SAMConfig
from sam_if.trainer import SAMMixin, SAMTrainer
from shared_kernels.testing.models import tiny_model
from torch.nn.functional import batch_norm, cross_entropy, gelu
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Trainers collect garbage when they begin: what was imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


class Net(torch.nn.Module):
    """A classifier that remembers what its forwards drew, and fails where it is told to."""

    def __init__(self, dtype=torch.float64, norm=None, dropout=0.0, spoilt=(), broken=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
        self.norm, self.dropout = norm or torch.nn.Identity(), torch.nn.Dropout(dropout)
        self.spoilt, self.broken, self.draws, self.calls = spoilt, broken, [], 0
        self.to(dtype)

    def forward(self, x, labels):
        self.calls += 1
        self.draws.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
        if self.calls == self.broken:
            raise MemoryError
        logits = self.last(self.dropout(self.norm(gelu(self.first(x)))))
        loss = cross_entropy(logits, labels)
        return {"loss": loss * torch.inf if self.calls in self.spoilt else loss, "logits": logits}


def rows(count, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, generator=generator).to(dtype),
         "labels": int(torch.randint(3, (), generator=generator))}
        for _ in range(count)
    ]  # fmt: skip


def options(folder, **changes):
    known = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 8,
        "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**(known | changes))


def trained(folder, model, data, sam=None, kind=SAMTrainer, before=None, optimizers=(None, None),
            callbacks=None, **changes):  # fmt: skip
    """Train, and return the trainer."""
    more = {} if kind is Trainer else {"sam": sam}
    trainer = kind(
        model, options(folder, **changes), train_dataset=data, optimizers=optimizers,
        callbacks=callbacks, **more,
    )  # fmt: skip
    if before is not None:
        before(trainer)
    trainer.train()
    return trainer


def told(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def length(tensors):
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def moved(model, grads, rho, adaptive=False, decay=0.0):
    """Move a model's weights as the papers do, and return those from before."""
    before = [p.detach().clone() for p in parameters(model)]
    scales = [p.abs() if adaptive else torch.ones_like(p) for p in before]
    grads = [g + decay * p for g, p in zip(grads, before, strict=True)]
    norm = length([t * g for t, g in zip(scales, grads, strict=True)]) + 1e-12
    with torch.no_grad():
        for p, t, g in zip(parameters(model), scales, grads, strict=True):
            p += rho * t * t * g / norm
    return before


def put_back(model, before):
    with torch.no_grad():
        for p, old in zip(parameters(model), before, strict=True):
            p.copy_(old)


def by_hand(model, made, losses, rho=0.05, adaptive=False, decay=0.0, clip=None, factor=None):
    """Take a step for every loss, a function without arguments; return losses and norms."""
    found = []
    schedule = LambdaLR(made, factor or (lambda t: 1 - t / len(losses)))
    for loss in losses:
        first = loss()
        before = moved(model, torch.autograd.grad(first, parameters(model)), rho, adaptive, decay)
        grads = torch.autograd.grad(loss(), parameters(model))
        put_back(model, before)
        norm = length(grads)
        share = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        for p, g in zip(parameters(model), grads, strict=True):
            p.grad = share * g
        made.step()
        schedule.step()
        found.append((first.item(), norm.item()))
    return found


def stacked(data):
    return {"x": torch.stack([row["x"] for row in data]),
            "labels": torch.tensor([row["labels"] for row in data])}  # fmt: skip


def windows(data, size, steps):
    """Rows of each step, from the beginning again where they end."""
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return [parts[step % len(parts)] for step in range(steps)]


def mean_losses(model, data, size=8, steps=6):
    return [lambda part=part: model(**stacked(part))["loss"] for part in windows(data, size, steps)]


def same(one, other, most=0.0):
    """Hold two models' weights against each other, and see that there is something to hold."""
    found, wanted = one.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    assert found
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=most, atol=most, msg=name)


# --- against loops of two gradients --------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_two_gradients_written_out(optim, clip, tmp_path):
    model, twin, data = Net(), Net(), rows(32)
    made = (
        torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        if optim == "sgd"
        else torch.optim.AdamW(twin.parameters(), lr=0.1, eps=1e-8, weight_decay=0.0)
    )
    trainer = trained(
        tmp_path, model, data, SAMConfig(rho=0.3), optim=optim, max_grad_norm=clip,
        optim_args="momentum=0.9" if optim == "sgd" else None,
    )  # fmt: skip
    found = by_hand(twin, made, mean_losses(twin, data), 0.3, clip=clip or None)
    same(model, twin, 1e-12)
    # the loss at the weights, and the norm of the gradient that is stepped by before it is clipped
    assert told(trainer) == pytest.approx([loss for loss, _ in found], rel=1e-6)
    assert told(trainer, "grad_norm") == pytest.approx([norm for _, norm in found], rel=1e-6)
    assert told(trainer, "learning_rate") == pytest.approx([0.1 * (1 - t / 6) for t in range(6)])
    assert "rho" not in trainer.state.log_history[0]
    assert trainer.sam_optimizer.base_optimizer is trainer.optimizer.optimizer


def test_adaptive_with_decay(tmp_path):
    model, twin, data = Net(), Net(), rows(32)
    made = torch.optim.SGD(twin.parameters(), lr=0.1)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    config = SAMConfig(rho=0.8, adaptive=True, perturb_decay=True)
    trained(tmp_path, model, data, config, optimizers=(theirs, None))
    made.param_groups[0]["weight_decay"] = 0.02
    by_hand(twin, made, mean_losses(twin, data), 0.8, adaptive=True, decay=0.02)
    same(model, twin, 1e-12)


def test_a_trainer_is_as_it_was_without_a_radius(tmp_path):
    """With dropout: the second pass has the first's masks, and leaves chance as it found it."""
    data = [{"input_ids": torch.arange(k, k + 9), "labels": k % 3} for k in range(24)]
    made = [tiny_model("bert", num_hidden_layers=1) for _ in range(2)]
    common = {"optim": "adamw_torch_fused", "optim_args": None, "learning_rate": 1e-2,
              "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
              "train_sampling_strategy": "random", "max_grad_norm": 1.0}  # fmt: skip
    ours = trained(tmp_path, made[0], data, SAMConfig(rho=0.0), **common)
    plain = trained(tmp_path, made[1], data, kind=Trainer, **common)
    same(*made)
    assert told(ours) == told(plain)
    assert told(ours, "grad_norm") == told(plain, "grad_norm")
    # both passes are counted
    assert ours.state.total_flos == 2 * plain.state.total_flos > 0


# --- accumulation --------------------------------------------------------------------------------


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """Cross entropy of the next token, without the stock one's float32."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def texts(count):
    """Rows with more and more tokens that are not to be predicted."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        ids = torch.randint(3, 96, (10,), generator=generator)
        labels = ids.clone()
        labels[: number % 9] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def language_model(dtype=torch.float64):
    model = tiny_model("llama", num_hidden_layers=1, dtype=dtype)
    model.loss_function = exact_loss
    return model


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_accumulated_batches_are_one(dtype, most, tmp_path):
    """Four of eight are one of 32, and of 80 rows the last 16 are a step of their own."""
    data, models = texts(80), [language_model(dtype) for _ in range(3)]
    many = trained(
        tmp_path, models[0], data, SAMConfig(rho=0.2), gradient_accumulation_steps=4,
    )  # fmt: skip
    one = trained(
        tmp_path, models[1], data, SAMConfig(rho=0.2), per_device_train_batch_size=32,
    )  # fmt: skip
    same(models[0], models[1], most)
    assert told(many) == pytest.approx(told(one), rel=1e-6)
    assert told(many, "grad_norm") == pytest.approx(told(one, "grad_norm"), rel=1e-5)
    twin = models[2]

    def loss_of(part):
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
        logits = twin(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits, batch["labels"][:, 1:].flatten())

    losses = [lambda part=part: loss_of(part) for part in windows(data, 32, 6)]
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), losses, 0.2)
    same(models[0], twin, most)


def test_means_of_accumulated_batches(tmp_path):
    """A loss that is divided by the number of batches, of which the last step has fewer."""
    model, twin, data = Net(), Net(), rows(40)
    trained(tmp_path, model, data, SAMConfig(rho=0.3), gradient_accumulation_steps=3)
    losses = mean_losses(twin, data, 24)
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), losses, 0.3)
    same(model, twin, 1e-12)


def test_each_batch_by_its_own_gradient(tmp_path):
    model, twin, data = Net(), Net(), rows(48)
    trainer = trained(
        tmp_path, model, data, SAMConfig(rho=0.5, scope="per_microbatch"),
        gradient_accumulation_steps=3, max_grad_norm=0.4,
    )  # fmt: skip
    made, norms = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), []
    schedule = LambdaLR(made, lambda t: 1 - t / 6)
    for part in windows(data, 24, 6):
        sums = [torch.zeros_like(p) for p in twin.parameters()]
        for batch in (stacked(part[i : i + 8]) for i in range(0, 24, 8)):
            grads = torch.autograd.grad(twin(**batch)["loss"], parameters(twin))
            before = moved(twin, grads, 0.5)
            grads = torch.autograd.grad(twin(**batch)["loss"], parameters(twin))
            put_back(twin, before)
            sums = [s + g / 3 for s, g in zip(sums, grads, strict=True)]
        norms.append(float(length(sums)))
        for p, s in zip(twin.parameters(), sums, strict=True):
            p.grad = s * min(1.0, 0.4 / (norms[-1] + 1e-6))
        made.step()
        schedule.step()
    same(model, twin, 1e-12)
    assert told(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert any(norm > 0.4 for norm in norms)
    other = Net()
    trained(tmp_path, other, data, SAMConfig(rho=0.5), gradient_accumulation_steps=3,
            max_grad_norm=0.4)  # fmt: skip
    assert not torch.allclose(other.last.weight, model.last.weight, rtol=1e-4)


def test_one_process_is_all_of_them(tmp_path):
    models, data = [Net(), Net()], rows(48)
    for model, scope in zip(models, ("per_rank", "global"), strict=True):
        config = SAMConfig(rho=0.5, scope=scope)
        trained(tmp_path, model, data, config, gradient_accumulation_steps=2)
    same(*models)


class Stream(IterableDataset):
    """Rows one after the other, as many as there are."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_batches_that_no_step_follows_move_nothing(tmp_path):
    """Three batches in steps of two: of each epoch the last is left."""
    model, twin, data = Net(), Net(), rows(24)
    config = SAMConfig(rho=0.5)
    trained(tmp_path, model, Stream(data), config, gradient_accumulation_steps=2, max_steps=3)
    losses = mean_losses(twin, data[:16], 16, 3)
    by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), losses, 0.5)
    same(model, twin, 1e-12)


# --- chance, and running statistics --------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "per_microbatch"])
def test_both_passes_draw_the_same(scope, tmp_path):
    model, plain, data = Net(dropout=0.5), Net(dropout=0.5), rows(32)
    trained(tmp_path, model, data, SAMConfig(rho=0.3, scope=scope), gradient_accumulation_steps=2,
            max_steps=2)  # fmt: skip
    trained(tmp_path, plain, data, kind=Trainer, gradient_accumulation_steps=2, max_steps=2)
    a, b, c, d = plain.draws
    assert len({a, b, c, d}) == 4
    if scope == "global":
        assert model.draws == [a, b, a, b, c, d, c, d]
    else:
        assert model.draws == [a, a, b, b, c, c, d, d]


class Restless(Net):
    """Draws more where its weights are moved."""

    def forward(self, x, labels):
        found = super().forward(x, labels)
        if self.calls % 4 in (3, 0):
            torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        return found


def test_chance_is_left_as_the_first_pass_left_it(tmp_path):
    model, plain, data = Restless(), Net(), rows(32)
    trained(tmp_path, model, data, SAMConfig(), gradient_accumulation_steps=2, max_steps=2)
    trained(tmp_path, plain, data, kind=Trainer, gradient_accumulation_steps=2, max_steps=2)
    assert model.draws[:2] + model.draws[4:6] == plain.draws


def statistics_by_hand(model, policy, momentum, made, parts, rho=0.3):
    """Train a net with batch norm, with its running statistics as numbers beside it."""
    mean, var = model.norm.running_mean.clone(), model.norm.running_var.clone()
    count, norm = 0, model.norm
    schedule = LambdaLR(made, lambda t: 1 - t / len(parts))

    def loss(batches, update):
        nonlocal mean, var, count
        losses = []
        for batch in batches:
            x = gelu(model.first(batch["x"]))
            if policy == "frozen":
                x = batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)
            else:
                if update:
                    count += 1
                    share = 1 / count if momentum is None else momentum
                    mean = (1 - share) * mean + share * x.detach().mean(0)
                    var = (1 - share) * var + share * x.detach().var(0)
                x = batch_norm(x, None, None, norm.weight, norm.bias, True, eps=norm.eps)
            losses.append(cross_entropy(model.last(x), batch["labels"]))
        return torch.stack(losses).mean()

    for batches in parts:
        before = moved(model, torch.autograd.grad(loss(batches, True), parameters(model)), rho)
        grads = torch.autograd.grad(loss(batches, policy == "both"), parameters(model))
        put_back(model, before)
        for p, g in zip(parameters(model), grads, strict=True):
            p.grad = g
        made.step()
        schedule.step()
    return mean, var, count


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("policy", "count"), [("first", 12), ("both", 24), ("frozen", 0)])
def test_batch_norm(policy, count, momentum, tmp_path):
    def made():
        model = Net(norm=torch.nn.BatchNorm1d(8, momentum=momentum))
        model.norm.running_mean.fill_(0.25)
        model.norm.running_var.fill_(0.5)
        return model

    model, twin, data = made(), made(), rows(32)
    config = SAMConfig(rho=0.3, bn=policy)
    trained(tmp_path, model, data, config, gradient_accumulation_steps=2)
    parts = [[stacked(p[:8]), stacked(p[8:])] for p in windows(data, 16, 6)]
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    mean, var, counted = statistics_by_hand(twin, policy, momentum, optimizer, parts)
    assert int(model.norm.num_batches_tracked) == counted == count
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, var, rtol=1e-12, atol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    model.train()
    assert model.norm.training


# --- schedules, checkpoints ----------------------------------------------------------------------


class Radii(TrainerCallback):
    """Writes down the radii that a step begins with."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer = self.of()

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append([group["rho"] for group in self.trainer.sam_optimizer.param_groups])


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.8535534, 0.5, 0.1464466]),
     ("lr", [0.0, 0.5, 1.0, 0.5]), ("constant", [1.0, 1.0, 1.0, 1.0])],
)  # fmt: skip
def test_radii_follow_a_schedule(schedule, wanted, tmp_path):
    model, seen = Net(), Radii()
    groups = [{"params": model.first.parameters(), "rho": 0.4, "lr": 0.01},
              {"params": model.last.parameters()}]  # fmt: skip
    made = torch.optim.SGD(groups, lr=0.1)
    trainer = SAMTrainer(
        model, options(tmp_path, max_steps=4, warmup_steps=2), train_dataset=rows(32),
        sam=SAMConfig(rho=0.2, rho_schedule=schedule), optimizers=(made, None), callbacks=[seen],
    )  # fmt: skip
    seen.of = lambda: trainer
    trainer.train()
    assert [a for a, _ in seen.seen] == pytest.approx([0.4 * f for f in wanted], rel=1e-6)
    assert [b for _, b in seen.seen] == pytest.approx([0.2 * f for f in wanted], rel=1e-6)
    logged = [e["rho"] for e in trainer.state.log_history if "rho" in e]
    assert logged == ([] if schedule == "constant" else [a for a, _ in seen.seen])


@pytest.mark.parametrize("schedule", ["lr", "cosine"])
def test_a_run_goes_on_bit_for_bit(schedule, tmp_path):
    data = [{"input_ids": torch.arange(k, k + 9), "labels": k % 3} for k in range(24)]
    config = SAMConfig(rho=0.2, rho_schedule=schedule)
    common = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-2,
              "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 8,
              "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 4,
              "warmup_steps": 2, "max_grad_norm": 1.0}  # fmt: skip
    whole = tiny_model("bert", num_hidden_layers=1)
    first = trained(tmp_path, whole, data, config, **common)
    again = tiny_model("bert", num_hidden_layers=1, seed=5)
    second = SAMTrainer(again, options(tmp_path, **common), train_dataset=data, sam=config)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same(again, whole)
    assert told(second) == told(first)
    assert told(second, "rho") == told(first, "rho")
    kept = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt")
    kinds = {key for state in kept["state"].values() for key in state}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}


def test_a_plain_checkpoint_goes_on_as_sam(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    model, twin, data = Net(), Net(), rows(48)
    trained(tmp_path, twin, data, kind=Trainer, max_steps=3, **common)
    trainer = SAMTrainer(
        model, options(tmp_path, **common), train_dataset=data, sam=SAMConfig(rho=0.3)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    kinds = [[twin.first.weight, twin.last.weight], [twin.first.bias, twin.last.bias]]
    made = torch.optim.SGD([{"params": params} for params in kinds], lr=0.1, momentum=0.9)
    made.load_state_dict(torch.load(tmp_path / "checkpoint-3" / "optimizer.pt"))
    by_hand(twin, made, mean_losses(twin, data)[3:], 0.3, factor=lambda t: 1.0)
    same(model, twin, 1e-12)


# --- models, trainers ----------------------------------------------------------------------------


def test_gradient_checkpointing(tmp_path):
    data, models = texts(16), [language_model(), language_model()]
    for model, again in zip(models, (True, False), strict=True):
        trained(tmp_path, model, data, SAMConfig(rho=0.2), gradient_checkpointing=again,
                max_steps=3)  # fmt: skip
    same(*models, 1e-12)


@pytest.mark.peer
def test_adapters_move_alone(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, seen = peft.get_peft_model(language_model(torch.float32), config), []

    def look(*_):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    model.register_forward_pre_hook(look)
    trainer = trained(tmp_path, model, texts(16), SAMConfig(rho=0.25), max_steps=2)
    assert len(seen) == 4
    for one, two in (seen[:2], seen[2:]):
        changes = {name: two[name] - value for name, value in one.items()}
        assert {n for n, c in changes.items() if c.any()} == {n for n in one if "lora" in n}
        assert float(length(changes.values())) == pytest.approx(0.25, rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(language_model(torch.float32), tmp_path / "saved")
    same(loaded, model)


@pytest.mark.peer
def test_trainers_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    class SAMSFTTrainer(SAMMixin, trl.SFTTrainer):
        pass

    words = ["<pad>", "<s>", "</s>", *(f"w{k}" for k in range(60))]
    split = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<pad>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="</s>", pad_token="<pad>")
    lines = [{"prompt": f"w{k} w{k + 1}", "completion": f" w{k + 2} w{k + 3}"} for k in range(16)]
    made = []
    for kind, more in ((SAMSFTTrainer, {"sam": SAMConfig(rho=0.1)}), (trl.SFTTrainer, {})):
        args = trl.SFTConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
            report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no", bf16=False,
            gradient_accumulation_steps=2, use_cpu=True,
        )  # fmt: skip
        made.append(kind(tiny_model("llama", num_hidden_layers=1), args, processing_class=tokenizer,
                         train_dataset=Dataset.from_list(lines), **more))  # fmt: skip
        made[-1].train()
    ours, plain = (trainer.state.log_history for trainer in made)
    # what the second pass sees is not counted
    assert [e["num_tokens"] for e in ours[:2]] == [e["num_tokens"] for e in plain[:2]] == [40, 80]
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert ours[0][name] == pytest.approx(plain[0][name], rel=1e-6)
    assert ours[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("scope", "broken"), [("global", 4), ("per_microbatch", 2)])
def test_what_fails_leaves_the_weights(scope, broken, tmp_path):
    model = Net(broken=broken)
    before = copy.deepcopy(model)
    config = SAMConfig(rho=0.5, scope=scope)
    with pytest.raises(MemoryError):
        trained(tmp_path, model, rows(32), config, gradient_accumulation_steps=2)
    same(model, before)


def test_training_twice_goes_on(tmp_path):
    """The optimizer is kept, and its schedule begins anew, as without SAM."""
    model, twin, data = Net(), Net(), rows(32)
    trainer = trained(tmp_path, model, data, SAMConfig(rho=0.3))
    sam = trainer.sam_optimizer
    trainer.train()
    assert trainer.sam_optimizer is sam
    made = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    by_hand(twin, made, mean_losses(twin, data), 0.3)
    made.param_groups[0]["lr"] = 0.1
    by_hand(twin, made, mean_losses(twin, data), 0.3)
    same(model, twin, 1e-12)


class Sharded(Trainer):
    """A trainer with flags that need more than one machine."""

    flags: ClassVar[dict] = {}

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        for name, value in self.flags.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"is_deepspeed_enabled": True}, "deepspeed: expected .* leave it unset"),
     ({"is_fsdp_enabled": True}, "fsdp: expected .* leave it unset"),
     ({"num_generations": 4}, "num_generations: expected a trainer .* fixed data")],
)  # fmt: skip
def test_trainers_that_are_refused(flags, words, tmp_path):
    kind = type("Refused", (SAMMixin, Sharded), {"flags": flags})
    with pytest.raises(ValueError, match=words):
        kind(Net(), options(tmp_path), train_dataset=rows(8))


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise",
                                   "apollo_adamw_layerwise"])  # fmt: skip
def test_optimizers_that_step_inside_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim: expected .* got str '{optim}'"):
        SAMTrainer(Net(), options(tmp_path, optim=optim), train_dataset=rows(8))


def test_arguments_that_are_refused(tmp_path):
    model = Net()
    with pytest.raises(TypeError, match="sam: expected a SAMConfig, got dict"):
        SAMTrainer(model, options(tmp_path), sam={"rho": 0.1})
    made = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"optimizers: expected .* the trainer wraps it"):
        SAMTrainer(model, options(tmp_path), train_dataset=rows(8), optimizers=(made, None))
    args = options(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"n_gpu: expected 1, .* torchrun"):
        SAMTrainer(model, args, train_dataset=rows(8))
    assert SAMTrainer(model, options(tmp_path)).sam == SAMConfig()
