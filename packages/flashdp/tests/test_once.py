"""A batch counts once: its backward pass run again would double what a unit can do."""

from __future__ import annotations

import pytest
import torch
from flashdp import DPTrainer, PrivacyArguments, PrivacyEngine, PrivacyError, poisson_data_loader
from shared_kernels.testing.models import tiny_inputs, tiny_model
from torch import nn

N, SIZE = 12, 3
ROWS = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
DATA = [{"x": row} for row in ROWS]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.left(x), self.right(x)


def make(model=None, **options):
    """A run whose every step is the whole data set in four physical batches."""
    model = Heads() if model is None else model
    loader = poisson_data_loader(
        DATA, num_steps=3, sample_rate=1.0, max_physical_batch_size=SIZE, secure_rng=False, seed=0,
        **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(
        model, optimizer, loader, noise_multiplier=0.0, max_grad_norm=1e3, expected_batch_size=1.0
    )
    return model, optimizer, loader, engine


def loss_of(out):
    return sum(part.square().sum() for part in out)


def sums_of(engine):
    return [engine.collector.sums[param].clone() for param in engine._parameters]


@pytest.mark.parametrize("annotate", [False, True])
def test_a_second_backward_of_a_batch_is_refused_and_adds_nothing(annotate):
    model, optimizer, loader, engine = make(annotate=annotate)
    batches = iter(loader)
    loss_of(model(**next(batches))).backward()
    second = next(batches)
    loss_of(model(**second)).backward()
    before = sums_of(engine)
    out = model(**second)
    with pytest.raises(PrivacyError, match="a second time"):
        loss_of(out).backward()
    assert all(torch.equal(*pair) for pair in zip(sums_of(engine), before, strict=True))
    for batch in batches:
        loss_of(model(**batch)).backward()
        optimizer.step()
    assert engine.accountant.steps == 3


@pytest.mark.parametrize("annotate", [False, True])
def test_every_batch_of_a_step_counts_once(annotate):
    model, _, loader, engine = make(annotate=annotate)
    for batch, _ in zip(loader, range(N // SIZE), strict=False):
        model(**batch)  # a forward without a backward is forgotten
        loss_of(model(**batch)).backward()
        model(**batch)  # and so is one that comes later
        with torch.no_grad():
            model(**batch)
    plain = Heads()
    loss_of(plain(ROWS)).backward()
    for found, param in zip(sums_of(engine), plain.parameters(), strict=True):
        torch.testing.assert_close(found, param.grad * (1 - 2**-16))


def test_a_pass_may_be_run_backward_in_parts():
    model, _, loader, engine = make()
    for part in model(**next(iter(loader))):
        loss_of([part]).backward()
    assert len(sums_of(engine)) == 4


def test_a_batch_of_an_earlier_step_is_refused():
    model, optimizer, loader, _ = make(annotate=True)
    batches = iter(loader)
    kept = [next(batches) for _ in range(N // SIZE)]
    for batch in kept:
        loss_of(model(**batch)).backward()
        optimizer.step()
    with pytest.raises(PrivacyError, match="a second time"):
        loss_of(model(**kept[0])).backward()


def test_batches_fetched_ahead_have_to_be_annotated():
    model, _, loader, _ = make()
    ahead = [next(batches) for batches in [iter(loader)] for _ in range(2)]
    loss_of(model(**ahead[0])).backward()
    with pytest.raises(PrivacyError, match="annotate=True"):
        loss_of(model(**ahead[1])).backward()
    model, _, loader, engine = make(annotate=True)
    ahead = [next(batches) for batches in [iter(loader)] for _ in range(2)]
    for batch in reversed(ahead):
        loss_of(model(**batch)).backward()
    assert len(sums_of(engine)) == 4


def test_a_step_broken_off_is_forgotten():
    model, _, loader, engine = make()
    for _ in range(2):
        batch = next(iter(loader))
        loss_of(model(**batch)).backward()
    plain = Heads()
    loss_of(plain(batch["x"])).backward()
    for found, param in zip(sums_of(engine), plain.parameters(), strict=True):
        torch.testing.assert_close(found, param.grad * (1 - 2**-16))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_a_batch_once(reentrant):
    inputs = tiny_inputs("llama", batch=4)
    sums = []
    for checkpoints in (False, True):
        model = tiny_model("llama").train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loader = poisson_data_loader(
            [{key: value[k] for key, value in inputs.items()} for k in range(4)],
            num_steps=1, sample_rate=1.0, max_physical_batch_size=2, secure_rng=False, seed=0,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = PrivacyEngine(secure_rng=False, seed=0)
        engine.make_private(
            model, optimizer, loader, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
        )
        for batch in loader:
            model(**batch).loss.backward()
        names = engine._parameters
        sums.append({names[p]: value for p, value in engine.collector.sums.items()})
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, msg=name)


def test_a_trainer_that_runs_a_batch_twice(tmp_path):
    from transformers import TrainingArguments

    class Twice(DPTrainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            return super().training_step(*args, **kwargs)

    inputs = tiny_inputs("llama", batch=N, length=6)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Twice(
        tiny_model("llama", num_hidden_layers=1), arguments,
        train_dataset=[{key: value[k] for key, value in inputs.items()} for k in range(N)],
        privacy=PrivacyArguments(noise_multiplier=1.0, expected_batch_size=4, target_delta=1e-3),
    )  # fmt: skip
    with pytest.raises(PrivacyError, match="a second time"):
        trainer.train()
    assert trainer.engine.accountant.steps == 0


def test_without_a_loader_nobody_can_tell():
    """Documented: own batches carry no number."""
    model = Heads()
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1e3,
        expected_batch_size=1.0,
    )  # fmt: skip
    loss_of(model(ROWS)).backward()
    once = sums_of(engine)
    loss_of(model(ROWS)).backward()
    for value, single in zip(sums_of(engine), once, strict=True):
        torch.testing.assert_close(value, 2 * single)
