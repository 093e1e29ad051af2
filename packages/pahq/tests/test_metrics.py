"""Metrics over sets of answers, against loops in float64, and metrics of one's own."""

import math

import pytest
import torch
from pahq import Task
from pahq.adapters import adapter_of
from pahq.metrics import (
    METRICS,
    CustomMetric,
    Metric,
    as_metric,
    best_logit,
    log_prob,
    mean_logit,
    metric_name,
    prob,
    spread,
)  # fmt: skip
from shared_kernels.testing.models import tiny_model

RIGHT = torch.tensor([[5, -1, -1], [6, 7, 95], [95, 0, -1]])
WRONG = torch.tensor([[15, 16], [95, -1], [19, 20]])
SETS = torch.tensor([[5, -1], [6, 7], [8, -1]])


def parts(name="gpt2", right=SETS, wrong=WRONG):
    adapter = adapter_of(tiny_model(name).double())
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (3, 7), generator=draws)
    task = Task(ids, ids.flip(1), torch.tensor([6, 2, 4]), right, wrong)
    final = torch.randn(4, 3, 7, 32, dtype=torch.float64, generator=draws)
    return adapter, task, final


def tokens(row):
    return [token for token in row.tolist() if token >= 0]


def test_sets():
    """-1 is no token, and least of all the last one."""
    logits = torch.randn(2, 3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for answers in (RIGHT, WRONG):
        for m in range(2):
            for n in range(3):
                x = [float(v) for v in logits[m, n]]
                mine = [x[t] for t in tokens(answers[n])]
                whole = sum(math.exp(v) for v in x)
                share = sum(math.exp(v) for v in mine) / whole
                wanted = (sum(mine) / len(mine), max(mine), share, math.log(share))
                for score, value in zip((mean_logit, best_logit, prob, log_prob), wanted,
                                        strict=True):  # fmt: skip
                    assert float(score(logits, answers)[m, n]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_metrics_of_sets(name):
    adapter, task, final = parts(name)
    logits = adapter.logits(final).detach()
    for metric in ("logit_diff", "prob_diff", "nll"):
        found = Metric(metric, adapter, task, final[0])(final).detach()
        for row in range(4):
            total = 0.0
            for n in range(3):
                x = logits[row, n, task.positions[n]]
                law = x.softmax(-1)
                right, wrong = tokens(SETS[n]), tokens(WRONG[n])
                if metric == "logit_diff":
                    total += float(x[right].mean() - x[wrong].mean())
                elif metric == "prob_diff":
                    total += float(law[right].sum() - law[wrong].sum())
                else:
                    total += math.log(float(law[right].sum()))
            assert float(found[row]) == pytest.approx(-total / 3, abs=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_one_answer_is_a_set_of_one(metric):
    adapter, task, final = parts(right=torch.tensor([5, 6, 7]), wrong=torch.tensor([8, 9, 10]))
    many = Task(task.clean, task.corrupted, task.positions,
                torch.tensor([[5, -1], [6, -1], [7, -1]]), task.wrong_answers[:, None])  # fmt: skip
    one, other = (Metric(metric, adapter, t, final[0])(final) for t in (task, many))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    if metric == "kl":
        assert one[0] == 0


def test_log_probabilities_do_not_underflow():
    logits = torch.zeros(1, 3, 96)
    logits[..., 50] = 1000.0
    logits[0, 1, 6], logits[0, 1, 7] = 200.0, 200.0
    logits[0, 2] -= 1e4
    wanted = [-1000.0, -800 + math.log(2), -1000.0]
    assert log_prob(logits, SETS)[0].tolist() == pytest.approx(wanted, rel=1e-6)
    assert prob(logits, SETS).max() == 0


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "nll"])
def test_gradients_are_those_of_differences(metric):
    adapter, task, final = parts()
    measure = Metric(metric, adapter, task, final[0])
    x = final[1:2].requires_grad_()
    (slope,) = torch.autograd.grad(measure(x).sum(), x)
    assert slope.isfinite().all()
    step = 1e-6 * torch.randn(
        x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        moved = float((measure(x + step) - measure(x - step))[0])
    assert moved == pytest.approx(2 * float((slope * step).sum()), rel=1e-4)
    # only where answers are given
    at = torch.zeros(3, 7, dtype=torch.bool)
    at[torch.arange(3), task.positions] = True
    assert (slope[0][~at] == 0).all()


@pytest.mark.parametrize("metric", [*METRICS, lambda logits: logits.std(-1).mean(-1)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_slopes_are_those_of_differences(name, metric):
    """Against central differences in every direction, away from the clean states."""
    adapter, task, final = parts(name)
    measure = Metric(metric, adapter, task, final[0])
    at = 0.3 * torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, step = measure.slopes(at), 1e-5
        along = torch.eye(32, dtype=torch.float64) * step
        for n in range(3):
            each = torch.zeros(32, 3, 32, dtype=torch.float64)
            each[:, n] = along
            change = measure.of(at + each)[0] - measure.of(at - each)[0]
            wanted = float(change.norm()) / (2 * step)
            assert float(found[n]) == pytest.approx(wanted, rel=1e-4, abs=1e-9)
            assert wanted > 1e-4
    assert not found.requires_grad


def test_a_metric_of_ones_own():
    adapter, task, final = parts()
    seen = []

    def entropy(logits):
        seen.append(tuple(logits.shape))
        law = logits.log_softmax(-1)
        return -(law.exp() * law).sum(-1).mean(-1)

    found = Metric(CustomMetric(entropy), adapter, task, final[0])(final)
    logits = adapter.logits(final)[:, torch.arange(3), task.positions]
    torch.testing.assert_close(found, entropy(logits))
    assert seen[0] == (4, 3, 96)
    high = Metric(CustomMetric(entropy, "entropy", maximise=True), adapter, task, final[0])(final)
    torch.testing.assert_close(high, -found)
    # the answers are not looked at
    bare = Task(task.clean, task.corrupted, task.positions, task.answers)
    torch.testing.assert_close(Metric(entropy, adapter, bare, final[0])(final), found)

    nll = Metric("nll", adapter, task, final[0])(final)
    own = CustomMetric(lambda logits: log_prob(logits, SETS).mean(-1), maximise=True)
    torch.testing.assert_close(Metric(own, adapter, task, final[0])(final), nll)


def test_steps_have_no_slope():
    adapter, task, final = parts()
    measure = Metric(
        lambda logits: (logits.argmax(-1) == 5).double().sum(-1), adapter, task, final[0]
    )
    assert measure.slopes(torch.zeros(3, 32, dtype=torch.float64)) is None


def test_names_of_metrics():
    def surprise(logits):
        return logits[:, 0, 0]

    assert [as_metric(name) for name in METRICS] == [*METRICS]
    assert as_metric(surprise) == CustomMetric(surprise, "surprise")
    own = CustomMetric(surprise, "other")
    assert as_metric(own) is own
    assert [metric_name(m) for m in ("kl", own)] == ["kl", "other"]


def test_bad_metrics():
    adapter, task, final = parts()
    with pytest.raises(ValueError, match="metric: expected one of kl"):
        Metric("accuracy", adapter, task, final[0])
    with pytest.raises(TypeError, match="metric: expected a name or a function"):
        as_metric(3)
    bare = Task(task.clean, task.corrupted, task.positions, task.answers)
    for name in ("logit_diff", "prob_diff"):
        with pytest.raises(ValueError, match="kl or nll without wrong answers"):
            Metric(name, adapter, bare, final[0])
    each = Metric(CustomMetric(lambda x: x[..., 0], "each"), adapter, task, final[0])
    with pytest.raises(
        ValueError, match=r"metric each: expected shape \(4,\), got float64 \(4, 3\)"
    ):
        each(final)
    for function in (lambda x: 1.0, lambda x: x.argmax(-1).sum(-1)):
        own = Metric(CustomMetric(function, "own"), adapter, task, final[0])
        with pytest.raises(TypeError, match="metric own: expected a floating tensor"):
            own(final)


class Shifted:
    """An adapter of nothing but a head, whose last weight moves all logits alike."""

    def __init__(self, size, dtype):
        draws = torch.Generator().manual_seed(0)
        weight = torch.randn(size, 9, generator=draws, dtype=torch.float64)
        weight[:, -1] = 1
        module = torch.nn.Linear(9, size, bias=False, dtype=dtype)
        module.weight.data.copy_(weight)
        self.head = type("Head", (), {"module": module, "softcap": None, "scale": 1.0})
        self.dtype = dtype

    def norm(self, place):
        return None

    def logits(self, x):
        return self.head.module(x)


@pytest.mark.parametrize("shift", [-1000.0, -20.0, -10.0, 0.0, 15.0, 300.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_kl_of_logits_that_move_together(shift, size):
    """In float32, against float64: no shift of all logits is a difference."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    task = Task(ids, ids, torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    draws = torch.Generator().manual_seed(3)
    clean = torch.randn(1, 1, 9, generator=draws)
    moved = clean + size * torch.randn(1, 1, 9, generator=draws)
    moved[..., -1] = clean[..., -1]
    exact, rough = Shifted(500, torch.float64), Shifted(500, torch.float32)
    with torch.no_grad():
        rough.head.module.weight.copy_(exact.head.module.weight)
        exact.head.module.weight.copy_(rough.head.module.weight)
        p, q = (exact.logits(x.double()[0, 0]).log_softmax(-1) for x in (clean, moved))
        wanted = float((p.exp() * (p - q)).sum())
        moved[..., -1] += shift
        found = float(Metric("kl", rough, task, clean)(moved[None])[0])
    # differences of size 1e-3 are what is left of logits of the shift's size
    tolerance = 1e-5 + 1e-6 * abs(shift) / min(size, 1)
    assert found == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_spread(dtype):
    eps = torch.finfo(dtype).eps
    assert spread(3.0, 3.0 + 8 * eps, dtype) == 0
    assert spread(0.0, 0.0, dtype) == 0
    assert spread(3.0, 3.0 + 1000 * eps, dtype) == -1000 * eps
    assert spread(1e-9, 2e-9, dtype) == -1e-9
