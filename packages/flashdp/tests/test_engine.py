"""Clipped sums against a per-unit loop, in float64; what can leak, and what a unit can move."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from flashdp.engine import PrivacyEngine
from flashdp.errors import PrivacyError
from flashdp.losses import per_sample_loss
from flashdp.records import MatrixRecord, TableRecord, inner_product
from flashdp.units import Units
from shared_kernels.testing.models import tiny_inputs, tiny_model
from torch import nn

ROWS = 5


class Mixed(nn.Module):
    """One of everything: convolutions, norms, a table, matrices with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.wide = nn.Conv1d(6, 6, 3, padding="same", dilation=2, padding_mode="reflect")
        self.group = nn.GroupNorm(2, 6)
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.mid = nn.Linear(6, 7)
        self.out = nn.Linear(7, 3, bias=False)

    def forward(self, image, tokens):
        x = self.group(self.conv(image)).flatten(2)
        x = self.norm(self.wide(x).transpose(1, 2))
        x = x.mean(1, keepdim=True) + self.rms(self.table(tokens))
        return self.out(torch.tanh(self.mid(x))).square().mean((1, 2))


def mixed_batch(rows=ROWS, dtype=torch.float64):
    g = torch.Generator().manual_seed(4)
    image = torch.randn(rows, 4, 8, 8, generator=g, dtype=dtype)
    return image, torch.randint(0, 11, (rows, 9), generator=g)


def make(model, *, optimizer=None, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0}
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(model, optimizer, **{**options, **kwargs})
    return engine, optimizer


def sums_of(engine):
    names = engine._parameters
    return {names[p]: s.clone() for p, s in engine.collector.take().items()}


def unit_gradients(model, losses_of, units):
    """Gradients of each unit alone, by ordinary autograd."""
    found = []
    for unit in units:
        model.zero_grad()
        losses_of(model, unit).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def clipped(gradients, groups, thresholds, *, kind="abadi"):
    """The definition: clip each unit's groups, then sum."""
    total = {}
    for unit in gradients:
        for names, threshold in zip(groups, thresholds, strict=True):
            norm = math.sqrt(sum(float(unit[n].square().sum()) for n in names if n in unit))
            norm = max(norm, 1e-300)
            factor = min(1.0, threshold / norm) if kind == "abadi" else threshold / (norm + 0.01)
            for n in names:
                if n in unit:
                    total[n] = total.get(n, 0) + factor * (1 - 2**-16) * unit[n]
    return total


def assert_close(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    overall = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        # A key's bias has no gradient at all: what is found there is rounding.
        scale = max(float(value.abs().max()), 1e-2 * overall)
        error = float((found[name].double() - value.double()).abs().max()) / scale
        assert error < rtol, f"{name}: {error}"


def names_of(engine):
    return [
        [part.layer.names[local] for part in group.parts for local in part.names]
        for group in engine.collector.groups
    ]


@pytest.mark.parametrize("strategy", ["gram", "recompute", "spill", "auto"])
@pytest.mark.parametrize("grouping", ["param", "module", "flat"])
@pytest.mark.parametrize("kind", ["abadi", "automatic"])
def test_sums_are_those_of_a_loop_over_units(grouping, strategy, kind):
    torch.manual_seed(0)
    model = Mixed().double()
    plain = copy.deepcopy(model)
    image, tokens = mixed_batch()
    engine, _ = make(model, grouping=grouping, strategy=strategy, clipping=kind, max_grad_norm=0.05)
    model(image, tokens).sum().backward()
    gradients = unit_gradients(
        plain, lambda m, i: m(image[i : i + 1], tokens[i : i + 1]), range(ROWS)
    )
    groups, thresholds = names_of(engine), engine.calibration.thresholds.double().tolist()
    assert_close(sums_of(engine), clipped(gradients, groups, thresholds, kind=kind), rtol=1e-8)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gemma2"])
@pytest.mark.parametrize("grouping", ["module", "block", "flat"])
def test_language_models(name, grouping):
    model = tiny_model(name).to(torch.float32 if grouping == "block" else torch.float64).eval()
    plain, inputs = copy.deepcopy(model).double(), tiny_inputs(name, batch=4)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :5] = -100
    engine, _ = make(model, grouping=grouping, max_grad_norm=2.0)
    out = model(**inputs)
    out.loss.backward()

    def alone(m, i):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        return m(**row).loss

    gradients = unit_gradients(plain, alone, range(4))
    total = sum(float(alone(plain, i)) for i in range(4))
    assert float(out.loss) == pytest.approx(total, rel=1e-5)
    found = sums_of(engine)
    groups, thresholds = names_of(engine), engine.calibration.thresholds.double().tolist()
    tied = {n for n, _ in plain.named_parameters()} & {
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "model.decoder.embed_tokens.weight",
    }
    skip = tied if engine.calibration.sensitivity and _is_tied(plain) else set()
    if grouping == "flat":
        # Both uses are in one group, whose norm is that of their sum.
        groups, skip = [list(gradients[0])], set()
    expected = clipped(gradients, [[n for n in g if n not in skip] for g in groups], thresholds)
    assert_close({n: v for n, v in found.items() if n not in skip}, expected, rtol=1e-4)


def _is_tied(model):
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def test_every_architecture_without_clipping_is_ordinary_backward():
    for name in ("llama", "gpt2", "opt", "qwen3", "gemma2"):
        model = tiny_model(name).eval()
        plain, inputs = copy.deepcopy(model), tiny_inputs(name, batch=3)
        engine, _ = make(model, max_grad_norm=[math.inf] * _groups(plain))
        model(**inputs).loss.backward()
        sum(plain(**{k: v[i : i + 1] for k, v in inputs.items()}).loss for i in range(3)).backward()
        expected = {n: p.grad for n, p in plain.named_parameters()}
        assert_close(sums_of(engine), expected, rtol=2e-4)


def _groups(model):
    return sum(
        any(p is not None and p.requires_grad for p in m._parameters.values())
        for m in model.modules()
    )


def test_tied_weights_add_up_linearly():
    model = tiny_model("llama", tie_word_embeddings=True)
    engine, _ = make(model, max_grad_norm=1.0)
    tied = [c for c in engine.calibration.clusters if len(c) == 2]
    assert len(tied) == 1
    thresholds = engine.calibration.thresholds.double()
    clusters = torch.stack([thresholds[c].sum() for c in engine.calibration.clusters])
    assert float(clusters.square().sum().sqrt()) == pytest.approx(1.0, rel=1e-6)
    assert engine.calibration.sensitivity == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_of_a_heads_and_a_tables_gradient(dtype):
    """Above the value, by its rounding alone; of rows, and of users with several or none."""
    g = torch.Generator().manual_seed(6)
    rows, tokens, width, vocabulary = 3, 5, 8, 11
    a, h = torch.randn(2, rows * tokens, width, generator=g, dtype=torch.float64).to(dtype)
    out = torch.randn(rows * tokens, vocabulary, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, vocabulary, (rows * tokens,), generator=g)
    single = Units.one_per_row(rows, torch.device("cpu"))
    users = Units.grouped(torch.tensor([0, 1, 1, 3]), torch.device("cpu"))
    for units in (single, users):
        cu = units.cu_rows * tokens
        head, table = MatrixRecord(a, out, cu, tokens), TableRecord(ids, h, cu, tokens)
        found = inner_product([head, table], units)
        for value, first, last in zip(found, cu[:-1], cu[1:], strict=True):
            some = slice(int(first), int(last))
            by_head = out[some].double().T @ a[some].double()
            by_table = torch.zeros_like(by_head).index_add(0, ids[some], h[some].double())
            expected = float((by_head * by_table).sum())
            size = float(by_head.abs().max() * by_table.abs().sum())
            error = float(value) - expected
            assert -1e-15 * size <= error <= 1e-12 * size
        assert inner_product([head, head], units) is None
        assert inner_product([head, table, table], units) is None
        assert inner_product([replace(head, transposed=True), table], units) is None


def test_uses_of_two_tied_weights_are_no_pair():
    """Two tied pairs, of each of which one use runs: they do not point along one parameter."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList([nn.Embedding(6, 4) for _ in range(2)])
            self.heads = nn.ModuleList([nn.Linear(4, 6, bias=False) for _ in range(2)])
            for table, head in zip(self.tables, self.heads, strict=True):
                head.weight = table.weight

        def forward(self, tokens):
            return self.heads[1](self.tables[0](tokens)).square().sum((1, 2))

    torch.manual_seed(0)
    model = Pairs().double()
    tokens = torch.randint(0, 6, (4, 3))
    engine, _ = make(model, grouping="flat", max_grad_norm=0.1, check_independence=False)
    for row in tokens:
        model(row[None]).sum().backward()
        norm = math.sqrt(sum(float(v.square().sum()) for v in sums_of(engine).values()))
        # Clipped by the sum of both norms, which is at most sqrt(2) too much.
        assert 0.07 <= norm <= 0.1


@pytest.mark.parametrize("users", [False, True])
def test_a_tied_weight_is_bounded_by_the_flat_threshold(users):
    """Two uses that point the same way: together they may not exceed C."""
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=1).double()
    inputs = tiny_inputs("llama", batch=4)
    engine, _ = make(model, grouping="flat", max_grad_norm=0.05, check_independence=False)
    given = {"dp_rows": torch.tensor([0, 3, 4], dtype=torch.int32)} if users else {}
    masks = torch.eye(2 if users else 4, dtype=torch.bool)
    for mask in masks:
        model(**inputs, **given, dp_mask=mask).loss.backward()
        found = sums_of(engine)
        norm = math.sqrt(sum(float(v.square().sum()) for v in found.values()))
        assert norm <= 0.05
        assert norm >= 0.05 * (1 - 1e-4)


ADVERSARIAL = ["cancelling", "huge", "nan", "inf", "zero", "duplicate"]


@pytest.mark.parametrize("grouping", ["module", "block", "flat"])
@pytest.mark.parametrize("strategy", ["gram", "recompute", "spill"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_unit_moves_a_sum_by_more_than_its_threshold(grouping, strategy, autocast):
    """Remove each unit in turn: every group moves by at most C_k, all together by at most C."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 5)

        def forward(self, x, weights):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return (self.head(self.norm(x)).sum(2) * weights).sum(1)

    torch.manual_seed(1)
    model = Scaled()
    x, weights = torch.randn(len(ADVERSARIAL), 6, 8), torch.ones(len(ADVERSARIAL), 6)
    x[0, 1::2], weights[0, 1::2] = x[0, ::2] * (1 + 1e-4), -1.0
    weights[1] *= 1e4
    weights[2, 0], weights[3, 0] = math.nan, math.inf
    weights[4] = 0
    x[5], weights[5] = x[1], weights[1]
    engine, _ = make(model, grouping=grouping, strategy=strategy, max_grad_norm=0.7)

    def run(rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(x[rows], weights[rows])
        losses.float().sum().backward()
        return sums_of(engine)

    everyone = list(range(len(ADVERSARIAL)))
    full = run(everyone)
    thresholds, groups = engine.calibration.thresholds.double(), names_of(engine)
    for unit in everyone:
        rest = run([i for i in everyone if i != unit])
        moved = torch.stack(
            [
                sum((full[n].double() - rest[n].double()).square().sum() for n in g).sqrt()
                for g in groups
            ]
        )
        assert torch.isfinite(moved).all()
        # Sums of float32 numbers of this size are off by their own rounding.
        assert bool((moved <= thresholds * (1 + 2e-6)).all()), (ADVERSARIAL[unit], moved)
        assert float(moved.norm()) <= 0.7 * (1 + 2e-6)


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1), (3, 1)])
def test_microbatches_give_one_sum_and_one_noise(sizes):
    inputs, results = tiny_inputs("llama", batch=4), []
    for parts in ((4,), sizes):
        model = tiny_model("llama").eval()
        engine, optimizer = make(model, noise_multiplier=0.5)
        start = 0
        for size in parts:
            model(**{k: v[start : start + size] for k, v in inputs.items()}).loss.backward()
            start += size
        optimizer.step()
        assert engine.accountant.steps == 1
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=2e-6)


def test_masked_rows_contribute_nothing_and_an_empty_draw_is_noise_alone():
    inputs = tiny_inputs("llama", batch=4)
    model = tiny_model("llama").eval()
    engine, optimizer = make(model)
    model(**{k: v[:3] for k, v in inputs.items()}).loss.backward()
    expected = sums_of(engine)
    mask = torch.tensor([True, True, True, False])
    model(**inputs, dp_mask=mask).loss.backward()
    assert_close(sums_of(engine), expected, rtol=1e-4)
    model(**inputs, dp_mask=torch.zeros(4, dtype=torch.bool)).loss.backward()
    assert all(not bool(v.any()) for v in sums_of(engine).values())
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_step_that_was_broken_off_leaves_nothing_behind():
    from flashdp.loader import poisson_data_loader

    rows = tiny_inputs("llama", batch=6)
    data = [{k: v[i] for k, v in rows.items()} for i in range(6)]
    model = tiny_model("llama").eval()
    loader = poisson_data_loader(
        data, num_steps=3, sample_rate=1.0, max_physical_batch_size=2, secure_rng=False, seed=0
    )
    engine, _ = make(model, data_loader=loader)

    def sums(batches):
        for batch in batches:
            model(**batch).loss.backward()
        return {engine._parameters[p]: s.clone() for p, s in engine.collector.sums.items()}

    started = iter(loader)
    sums([next(started)])
    found = sums(next(again) for again in [iter(loader)] for _ in range(3))
    engine.collector.take()
    assert_close(found, sums(next(more) for more in [iter(loader)] for _ in range(3)), rtol=1e-5)


def test_rows_of_one_user_are_clipped_together():
    model = tiny_model("llama").double().eval()
    plain, inputs = copy.deepcopy(model), tiny_inputs("llama", batch=4)
    engine, _ = make(model, max_grad_norm=1.5)
    model(**inputs, dp_rows=torch.tensor([0, 1, 4])).loss.backward()

    def user(m, rows):
        return sum(m(**{k: v[i : i + 1] for k, v in inputs.items()}).loss for i in rows)

    gradients = unit_gradients(plain, user, [[0], [1, 2, 3]])
    groups, thresholds = names_of(engine), engine.calibration.thresholds.double().tolist()
    skip = {"model.embed_tokens.weight"} if _is_tied(plain) else set()
    expected = clipped(gradients, [[n for n in g if n not in skip] for g in groups], thresholds)
    found = {n: v for n, v in sums_of(engine).items() if n not in skip}
    assert_close(found, expected, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(reentrant):
    inputs, results = tiny_inputs("llama", batch=3), []
    for checkpointed in (False, True):
        model = tiny_model("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        engine, _ = make(model, grouping="block")
        model(**inputs).loss.backward()
        results.append(sums_of(engine))
    assert_close(results[1], results[0], rtol=1e-5)


def test_a_module_used_twice_is_clipped_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.inner(torch.tanh(self.norm(self.inner(x))))).square().sum((1, 2))

    torch.manual_seed(0)
    model = Twice().double()
    plain, x = copy.deepcopy(model), torch.randn(3, 2, 4, dtype=torch.float64)
    engine, _ = make(model, max_grad_norm=0.3)
    model(x).sum().backward()
    gradients = unit_gradients(plain, lambda m, i: m(x[i : i + 1]), range(3))
    groups, thresholds = names_of(engine), engine.calibration.thresholds.double().tolist()
    assert_close(sums_of(engine), clipped(gradients, groups, thresholds), rtol=1e-6)


def test_a_loss_over_the_tokens_of_a_batch_is_refused():
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    model = BertForTokenClassification(config).eval()
    own = model.loss_function
    engine, _ = make(model)
    ids = torch.randint(5, 50, (2, 8))
    if model.loss_type == "ForTokenClassification":
        with pytest.raises(PrivacyError, match="averages over the tokens"):
            model.loss_function(torch.randn(2, 8, 2), ids % 2, config)
    logits = model(input_ids=ids).logits
    per_sample_loss(logits, ids % 2).sum().backward()
    assert sums_of(engine)
    engine.detach()
    assert model.loss_function == own


def test_the_loss_is_found_inside_wrappers():
    from flashdp.losses import loss_owner, unit_loss

    model = tiny_model("llama")

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    assert loss_owner(Wrapper(model)) is model
    engine, _ = make(model)
    assert model.loss_function is unit_loss
    engine.detach()
    assert model.loss_function is not unit_loss


def test_a_longer_unit_changes_no_other_units_gradient():
    inputs = tiny_inputs("llama", batch=2)
    inputs["labels"] = inputs["labels"].clone()
    results = []
    for cut in (0, 6):
        model = tiny_model("llama").double().eval()
        labels = inputs["labels"].clone()
        labels[1, :cut] = -100
        engine, _ = make(model, max_grad_norm=1e6)
        mask = torch.tensor([True, False])
        model(**{**inputs, "labels": labels}, dp_mask=mask).loss.backward()
        results.append(sums_of(engine))
    assert_close(results[1], results[0], rtol=1e-12)


def test_a_mean_over_rows_is_undone():
    torch.manual_seed(0)
    model = Mixed().double()
    plain, (image, tokens) = copy.deepcopy(model), mixed_batch()
    engine, _ = make(model, loss_reduction="mean", max_grad_norm=0.05)
    model(image, tokens).mean().backward()
    gradients = unit_gradients(
        plain, lambda m, i: m(image[i : i + 1], tokens[i : i + 1]), range(ROWS)
    )
    groups, thresholds = names_of(engine), engine.calibration.thresholds.double().tolist()
    assert_close(sums_of(engine), clipped(gradients, groups, thresholds), rtol=1e-8)


@pytest.mark.parametrize("allocation", ["global", "equal_budget", "dimension"])
def test_noise_has_the_variance_of_the_formula(allocation):
    """Spec 1.2: one joint Gaussian, whatever the weights."""
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100), nn.Linear(100, 10))
    thresholds, sigma = [0.3, 0.1, 2.0], 1.7
    engine, optimizer = make(
        model, noise_multiplier=sigma, max_grad_norm=thresholds, noise_allocation=allocation,
        expected_batch_size=4.0,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    std = list(engine.calibration.noise_std(sigma).values())
    assert sum((c / s) ** 2 for c, s in zip(thresholds, std[::2], strict=True)) == pytest.approx(
        1 / sigma**2
    )
    if allocation == "global":
        assert std[0] == pytest.approx(sigma * math.sqrt(sum(c * c for c in thresholds)))
    if allocation == "equal_budget":
        assert std[0] == pytest.approx(sigma * thresholds[0] * math.sqrt(3))
    for p, old, s in zip(model.parameters(), before, std, strict=True):
        if p.numel() >= 20_000:
            noise = (old - p.detach()).flatten() * 4.0
            spread = s / math.sqrt(2 * p.numel())
            assert float(noise.std()) == pytest.approx(s, abs=4 * spread)
            assert abs(float(noise.mean())) < 4 * s / math.sqrt(p.numel())


def test_noise_differs_between_steps_and_parameters():
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False))
    _, optimizer = make(model, noise_multiplier=1.0)
    drawn = []
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        drawn += [
            (p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)
        ]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert float(correlations.abs().max()) < 4 / math.sqrt(40_000)


def test_noise_follows_thresholds_however_they_change():
    model = Mixed()
    engine, _ = make(model, noise_multiplier=1.0)
    calibration = engine.calibration
    before = calibration.noise_std(1.0)
    calibration.thresholds *= 2
    twice = calibration.noise_std(1.0)
    assert twice == {param: pytest.approx(2 * std) for param, std in before.items()}
    state = engine.state_dict()
    calibration.thresholds = calibration.thresholds / 4
    assert calibration.noise_std(1.0) == {p: pytest.approx(s / 2) for p, s in before.items()}
    assert state["thresholds"] != engine.state_dict()["thresholds"]


def test_adaptive_thresholds_find_the_quantile():
    from flashdp.groups import AdaptiveThresholds

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    engine, optimizer = make(
        model, thresholds=AdaptiveThresholds(quantile=0.7, eta=0.3), noise_multiplier=0.0,
        max_grad_norm=30.0, expected_batch_size=200.0,
    )  # fmt: skip
    scale = torch.linspace(0.01, 1, 200)[:, None]
    for _ in range(120):
        (model(scale) * 1.0).sum().backward()
        optimizer.step()
    assert float(engine.calibration.thresholds[0]) == pytest.approx(0.7, abs=0.05)


# -- what must be refused --------------------------------------------------------------------------


def test_uncovered_parameters_are_refused_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x * self.scale).sum(1)

    with pytest.raises(PrivacyError, match=r"scale.*no rule covers.*requires_grad_"):
        make(Odd())


class Curve(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.sin(x @ self.weights)


def test_the_fallback_is_asked_for_and_gives_the_sums_of_a_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Curve()).double()
    plain, x = copy.deepcopy(model), torch.randn(3, 5, 4, dtype=torch.float64)
    with pytest.raises(PrivacyError, match="no rule covers a Curve"):
        make(copy.deepcopy(model))
    engine, _ = make(model, fallback=True, max_grad_norm=0.4)
    model(x).square().sum().backward()
    gradients = unit_gradients(plain, lambda m, i: m(x[i : i + 1]).square(), range(3))
    groups, thresholds = names_of(engine), engine.calibration.thresholds.double().tolist()
    assert_close(sums_of(engine), clipped(gradients, groups, thresholds), rtol=1e-8)
    assert engine.coverage["1.weights"] == "vmap fallback"


def test_batch_norm_is_refused():
    with pytest.raises(PrivacyError, match=r"BatchNorm1d mixes the units"):
        make(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_a_gradient_past_its_layer_is_refused():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return (self.linear(x) @ self.linear.weight).sum(1)

    model = Past()
    make(model)
    with pytest.raises(PrivacyError, match=r"linear\.weight.*past its private layer"):
        model(torch.randn(2, 3)).sum().backward()


def test_a_wrong_norm_is_found_by_the_probe():
    class BadLayerNorm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * self.weight

    with pytest.raises(PrivacyError, match=r"disagree on this BadLayerNorm"):
        make(nn.Sequential(nn.Linear(4, 4), BadLayerNorm(4)))


def test_flattened_tokens_are_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x.reshape(-1, 3)).sum()

    model = Flat()
    make(model)
    with pytest.raises(PrivacyError, match="which row belongs to which"):
        model(torch.randn(2, 4, 3)).backward()


def test_backward_of_an_earlier_forward_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    make(model)
    first = model(torch.randn(2, 3)).sum()
    model(torch.randn(2, 3))
    with pytest.raises(PrivacyError, match="backward of an earlier forward"):
        first.backward()


def test_two_backwards_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    make(model)
    loss = model(torch.randn(2, 3)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="ran twice"):
        loss.backward()


def test_amplification_needs_a_poisson_loader():
    model = nn.Linear(3, 3)
    with pytest.raises(PrivacyError, match="claims amplification"):
        make(model, sample_rate=0.01)
    loader = torch.utils.data.DataLoader(torch.randn(10, 3))
    with pytest.raises(PrivacyError, match="does not say that it draws by Poisson"):
        make(nn.Linear(3, 3), data_loader=loader, sample_rate=0.01)


def test_other_parameters_in_the_optimizer_are_refused():
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(ValueError, match="train without privacy"):
        make(model, optimizer=torch.optim.SGD([*model.parameters(), *other.parameters()], lr=1.0))


def test_accounting_comes_before_the_update_and_resumes():
    model = nn.Linear(3, 3)
    engine, optimizer = make(model, noise_multiplier=1.0)
    optimizer.step()
    assert engine.get_epsilon(1e-5) > 0
    state = engine.state_dict()
    resumed = PrivacyEngine()
    twin = nn.Linear(3, 3)
    resumed.make_private(
        twin, torch.optim.SGD(twin.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=1.0,
    )  # fmt: skip
    resumed.load_state_dict(state)
    assert resumed.accountant.steps == 1
    with pytest.raises(PrivacyError, match="same seed"):
        engine.load_state_dict(state)


def test_detach_gives_everything_back():
    model = tiny_model("llama")
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    engine, optimizer = make(model)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    engine.detach()
    assert [type(m) for m in model.modules()] == classes
    inputs = tiny_inputs("llama")
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()


def test_losses_of_rows_do_not_depend_on_each_other():
    logits = torch.randn(2, 5, 7)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 2:] = -100
    found = per_sample_loss(logits, labels)
    for row in range(2):
        one = nn.functional.cross_entropy(logits[row], labels[row], ignore_index=-100)
        torch.testing.assert_close(found[row], one)
    empty = per_sample_loss(logits, torch.full((2, 5), -100))
    assert not bool(empty.any())


def test_a_report_lists_what_is_covered_also_after_detaching():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    engine, optimizer = make(model, noise_multiplier=2.0, max_grad_norm=0.5)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    report = engine.report(1e-5, notes=["a remark"])
    assert report.steps == 1
    assert report.epsilon == engine.get_epsilon(1e-5)
    assert report.max_grad_norm == pytest.approx(0.5)
    assert [(c.parameter, c.rule, c.size) for c in report.coverage] == [
        (name, engine.coverage[name], p.numel()) for name, p in model.named_parameters()
    ]
    assert report.thresholds.keys() == {"0", "1"}
    engine.detach()
    assert engine.report(1e-5, notes=["a remark"]) == report
    assert "a remark" in report.to_markdown()


def test_adapters_train_with_a_loss_per_unit():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    inputs = tiny_inputs("llama", batch=3)
    inputs["labels"][0, :6] = -100
    alone = [float(model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss) for i in range(3)]
    whole = float(model(**inputs).loss)
    engine, _ = make(model, max_grad_norm=1e6)
    assert float(model(**inputs).loss) == pytest.approx(sum(alone), rel=1e-5)
    engine.detach()
    assert float(model(**inputs).loss) == pytest.approx(whole, rel=1e-6)
