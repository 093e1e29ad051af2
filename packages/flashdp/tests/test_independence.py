"""The numeric probe: who lets units of a batch move each other's gradients is found out."""

from __future__ import annotations

import copy
import importlib.util
import random

import numpy as np
import pytest
import torch
from flashdp.engine import PrivacyEngine
from flashdp.errors import PrivacyError
from flashdp.losses import per_sample_loss
from shared_kernels.testing.models import tiny_inputs, tiny_model
from torch import nn

ROWS = 4


def attach(model, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    engine = PrivacyEngine(secure_rng=False, seed=0, accountant="rdp")
    defaults = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0}
    engine.make_private(model, optimizer, **{**defaults, **options})
    return engine, optimizer


def uneven(name="llama"):
    """A batch whose rows have 9, 7, 5 and 3 labels."""
    inputs = tiny_inputs(name, batch=ROWS)
    for k in range(ROWS):
        inputs["labels"][k, : 2 * k + 1] = -100
    return inputs


class Net(nn.Module):
    """Logits of tokens, with something in the middle that may look at other rows."""

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.middle, self.last = middle or nn.Identity(), nn.Linear(8, 20)

    def forward(self, tokens):
        return self.last(torch.tanh(self.middle(self.first(self.table(tokens)))))


def tokens():
    return torch.randint(0, 20, (ROWS, 6), generator=torch.Generator().manual_seed(3))


# -- what passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma2"])
@pytest.mark.parametrize("training", [True, False])
def test_causal_language_models_pass(name, training):
    model = tiny_model(name).train(training)
    engine, _ = attach(model)
    engine.validate(uneven(name))
    assert engine.independence.status == "loss"


def test_dropout_is_the_same_in_both_runs():
    model = tiny_model("gpt2", resid_pdrop=0.4, embd_pdrop=0.4, attn_pdrop=0.4).train()
    engine, _ = attach(model)
    engine.validate(uneven("gpt2"))


@pytest.mark.parametrize("grouping", ["param", "module", "block", "flat"])
def test_every_grouping_and_checkpoints_pass(grouping):
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, _ = attach(model, grouping=grouping)
    engine.validate(uneven())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pass(dtype):
    engine, _ = attach(tiny_model("llama", dtype=dtype))
    engine.validate(uneven())


def test_under_autocast():
    engine, _ = attach(tiny_model("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        engine.validate(uneven())


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is missing")
def test_adapters_pass():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config).train()
    engine, _ = attach(model)
    engine.validate(uneven())


def test_users_with_several_rows_pass():
    engine, _ = attach(tiny_model("llama"))
    engine.validate({**uneven(), "dp_rows": torch.tensor([0, 1, 4])})


# -- what is found out -----------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """A model class that averages over the labels of the whole batch by itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        logits = self.model(input_ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_mean_over_the_batchs_tokens_inside_the_model(autocast):
    engine, _ = attach(OwnLoss(tiny_model("llama")), loss_reduction="mean")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(PrivacyError, match=r"unit 0, 2 has another gradient.*so it is the loss"),
    ):
        engine.validate(uneven())


def test_a_mean_over_the_batchs_tokens_outside_the_model():
    def mean(model, batch):
        logits = model(batch["x"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def ours(model, batch):
        return per_sample_loss(model(batch["x"]), batch["labels"]).sum()

    engine, _ = attach(Net())
    batch = {"x": tokens(), "labels": tokens().roll(1, 1)}
    batch["labels"][0, :2] = -100
    with pytest.raises(PrivacyError, match="so it is the loss"):
        engine.validate(batch, loss=mean)
    engine.validate(batch, loss=ours)
    assert engine.independence.status == "loss"


def mixture(**config):
    """Attention is trained; experts and routers are not."""
    model = tiny_model("mixtral", **config).train()
    for name, param in model.named_parameters():
        param.requires_grad_("self_attn" in name)
    return model


def test_a_routers_loss():
    engine, _ = attach(mixture(output_router_logits=True))
    with pytest.raises(PrivacyError, match="load-balancing"):
        engine.validate(uneven("mixtral"))
    engine, _ = attach(mixture(output_router_logits=False))
    engine.validate(uneven("mixtral"))


class Averaged(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.mean(0, keepdim=True)


class OwnBatchNorm(nn.Module):
    """Not an `nn.BatchNorm`, so that its type says nothing."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if not self.training:
            return x - self.mean
        mean = x.detach().mean((0, 1))
        self.mean.mul_(0.9).add_(0.1 * mean)
        return (x - mean) / (x.var((0, 1)) + 1e-5).sqrt()


class Neighbour(nn.Module):
    """Only ever looks at the row before: units further apart are strangers."""

    def forward(self, x):
        return torch.cat([x[:1], x[1:] + 1e-3 * x[:-1].detach()])


@pytest.mark.parametrize("middle", [Averaged, OwnBatchNorm, Neighbour])
@pytest.mark.parametrize("automatic", [False, True])
def test_layers_that_see_other_rows(middle, automatic):
    model = Net(middle()).train()
    engine, _ = attach(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PrivacyError, match=r"at the input of layer 'last'"):
        model(tokens()) if automatic else engine.validate(tokens())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_batch_that_is_not_the_first_dimension():
    """With as many tokens as rows the shapes fit, and tokens would be taken for units."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x.transpose(0, 1)))).transpose(0, 1)

    model = Transposed()
    attach(model)
    with pytest.raises(PrivacyError, match="units of the batch are coupled"):
        model(torch.randn(ROWS, ROWS, 6))


@pytest.mark.parametrize("seen", [0, 1])
def test_one_direction_is_enough(seen):
    """One of two rows sees the other, but not the other way round."""

    class OneWay(nn.Module):
        def forward(self, x):
            return x + 0.1 * x[seen].detach() * torch.arange(2).eq(1 - seen)[:, None, None]

    engine, _ = attach(Net(OneWay()))
    with pytest.raises(PrivacyError, match=f"unit {1 - seen} has another gradient"):
        engine.validate(tokens()[:2])


# -- the first batch -------------------------------------------------------------------------------


def test_the_first_batch_is_probed_once_and_nothing_is_left_behind():
    def seed():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002

    def draw(*_):
        drawn[:] = float(torch.rand(())), np.random.rand(), random.random()  # noqa: NPY002

    drawn = []
    model = Net(nn.Dropout(0.3)).train()
    plain = copy.deepcopy(model)
    runs = []
    model.middle.register_forward_hook(lambda *_: runs.append(1))
    for each in (model, plain):
        each.middle.register_forward_hook(draw)
    engine, optimizer = attach(model)
    other, _ = attach(plain, check_independence=False)
    seed()
    per_sample_loss(model(tokens()), tokens()).sum().backward()
    after = drawn[:]
    assert len(runs) == 4
    seed()
    per_sample_loss(plain(tokens()), tokens()).sum().backward()
    assert drawn == after
    sums, expected = engine.collector.take(), other.collector.take()
    for mine, its in zip(sums.values(), expected.values(), strict=True):
        assert torch.equal(mine, its)
    assert all(p.grad is None for p in model.parameters())
    assert engine.accountant.steps == 0
    optimizer.step()
    model(tokens()).sum().backward()
    assert len(runs) == 5
    assert engine.independence.status == "outputs"
    model.eval()(tokens())
    assert len(runs) == 9  # batch statistics are only taken in training, so each mode is probed


def test_a_probe_in_the_middle_of_a_step_changes_no_sum():
    model = Net()
    engine, _ = attach(model, check_independence=False)
    loss = per_sample_loss(model(tokens()), tokens()).sum()
    engine.validate(tokens())
    loss.backward()
    before = {p: s.clone() for p, s in engine.collector.sums.items()}
    engine.validate(tokens())
    assert engine.independence.status == "outputs"
    assert all(torch.equal(engine.collector.sums[p], s) for p, s in before.items())
    per_sample_loss(model(tokens()), tokens()).sum().backward()
    for param, value in engine.collector.sums.items():
        torch.testing.assert_close(value, 2 * before[param])


def test_a_batch_of_one_unit_needs_no_probe():
    model = Net(Averaged())
    engine, _ = attach(model)
    model(tokens()[:1])
    assert engine.independence.status == "not needed"
    with pytest.raises(ValueError, match="at least 2 units"):
        engine.validate(tokens()[:1])
    with pytest.raises(PrivacyError, match="coupled"):
        model(tokens())


def test_padding_is_probed_too():
    model = Net(Averaged())
    engine, _ = attach(model)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    with pytest.raises(PrivacyError, match="coupled"):
        model(tokens(), dp_mask=mask)
    with pytest.raises(PrivacyError, match="coupled"):
        engine.validate({"tokens": tokens(), "dp_mask": mask})


def test_skipping_is_in_the_report():
    model = Net(Averaged())
    engine, optimizer = attach(model, check_independence=False, noise_multiplier=1.0)
    per_sample_loss(model(tokens()), tokens()).sum().backward()
    optimizer.step()
    report = engine.report(1e-5)
    assert report.independence == "skipped"
    assert any("not checked" in warning for warning in report.warnings)
    assert "was not checked" in report.to_markdown()


def test_what_a_probe_has_shown_is_in_the_report():
    inputs = uneven()
    for shown, call in {
        "loss": lambda model: model(**inputs),
        "outputs": lambda model: model(input_ids=inputs["input_ids"]),
        "not needed": lambda model: model(input_ids=inputs["input_ids"][:1]),
    }.items():
        model = tiny_model("llama")
        engine, optimizer = attach(model, noise_multiplier=1.0)
        out = call(model)
        per_sample_loss(out.logits, inputs["labels"][: len(out.logits)]).sum().backward()
        optimizer.step()
        report = engine.report(1e-5)
        assert report.independence == shown
        assert not any("checked" in warning for warning in report.warnings)
        assert type(report).from_dict(report.to_dict()) == report


# -- what cannot be checked ------------------------------------------------------------------------


def test_a_batch_that_shows_nothing():
    model = Net()
    engine, optimizer = attach(model, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="shows nothing"):
        engine.validate(torch.zeros(ROWS, 6, dtype=torch.long))
    engine.validate(torch.zeros(ROWS, 6, dtype=torch.long), other=tokens())
    assert engine.independence.status == "outputs"
    model = Net()
    engine, optimizer = attach(model, noise_multiplier=1.0)
    for _ in range(4):
        model(torch.zeros(ROWS, 6, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert engine.independence.status == "inconclusive"
    assert any("not checked" in warning for warning in engine.report(1e-5).warnings)


def test_outputs_that_are_no_rows():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, x):
            return {"all": self.inner(x).flatten(0, 1)}

    model = Bag()
    engine, _ = attach(model)
    model(tokens())
    assert engine.independence.status == "inconclusive"
    with pytest.raises(ValueError, match="give loss="):
        engine.validate(tokens())
    engine.validate(tokens(), loss=lambda model, x: model(x)["all"].square().sum())
    assert engine.independence.status == "loss"


def test_a_model_with_random_numbers_of_its_own():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x + torch.randn(x.shape, generator=self.own)

    model = Net(Noisy())
    attach(model)
    with pytest.raises(PrivacyError, match="other gradients for the same batch"):
        model(tokens())


def test_values_that_the_model_refuses():
    class Picky(nn.Module):
        def forward(self, x):
            return x

    model = Net(Picky())
    engine, _ = attach(model)
    first = tokens()
    model.register_forward_pre_hook(lambda m, args: _check_first(args[0], first))
    with pytest.raises(PrivacyError, match=r"validate\(batch, other=") as caught:
        model(first)
    assert isinstance(caught.value.__cause__, KeyError)
    engine.validate(first, other=first.roll(1, 1).index_copy(1, torch.tensor([0]), first[:, :1]))


def _check_first(x, first):
    if not torch.equal(x[:, 0], first[:, 0]):
        raise KeyError("rows have to begin as they did")


def test_a_unit_that_is_no_number_disturbs_nobody():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 4)

        def forward(self, x):
            return self.first(x).square()

    x = torch.randn(ROWS, 5)
    x[1] = float("nan")
    engine, _ = attach(Direct())
    engine.validate(x)
