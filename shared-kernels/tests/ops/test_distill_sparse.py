"""Distillation from a few tokens of a teacher, against the written-out loss and the whole one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.distill import (
    fused_linear_distillation,
    op,
    reference,
    sample_teacher,
    sparse_distillation,
)
from shared_kernels.ops.distill.arguments import merge_repeats
from shared_kernels.testing import check_op
from torch.nn.functional import cross_entropy, log_softmax

F64 = torch.float64
IGNORED = -100
IMPLS = ["reference", "split"]


def make(rows=19, vocabulary=31, width=8, *, ignored=0.3, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=F64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=F64).to(dtype)
    teacher = 2 * torch.randn(rows, vocabulary, generator=generator, dtype=F64)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return hidden, weight, teacher, labels


def cached(teacher, k, temperature=1.0):
    """The k likeliest tokens of each row, with entries that are none where k is not reached."""
    log_probs, indices = log_softmax(teacher / temperature, -1).topk(k)
    return indices.int(), log_probs


def naive(hidden, weight, labels, indices, log_probs, *, kd_weight, temperature=1.0, rows=None):
    """The bucketed loss row by row, from its formula."""
    s = hidden.double() @ weight.double().T
    lm = cross_entropy(s, labels, ignore_index=IGNORED)
    rows = (labels != IGNORED).nonzero()[:, 0] if rows is None else rows
    cross, entropy = 0.0, 0.0
    for row in rows.tolist():
        p = torch.softmax(s[row] / temperature, -1)
        own = [(int(v), float(lq)) for v, lq in zip(indices[row], log_probs[row], strict=True)]
        own = [(v, torch.tensor(lq, dtype=F64).exp()) for v, lq in own if v >= 0]
        masses = [(q, p[v]) for v, q in own]
        outside = [v for v in range(len(p)) if v not in {v for v, _ in own}]
        if outside:
            rest = torch.ones((), dtype=F64) - sum(q for _, q in own)
            masses.append((rest, p[outside].sum()))
        cross = cross - sum(q * x.log() for q, x in masses)
        entropy = entropy - sum(q * q.log() for q, _ in masses)
    loss = (1 - kd_weight) * lm + kd_weight * temperature**2 * cross / len(rows)
    return loss, lm, (cross - entropy) / len(rows), entropy / len(rows)


def differentiate(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def assert_near(gradients, expected, tolerance):
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm() + 1e-14


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 1.0])
def test_against_the_written_out_loss(impl, kd_weight, temperature):
    hidden, weight, teacher, labels = make()
    for k in (1, 6, 30, 31):
        indices, log_probs = cached(teacher, k, temperature)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        options = {"kd_weight": kd_weight, "temperature": temperature}
        expected, *metrics = naive(*leaves, labels, indices, log_probs, **options)
        found = sparse_distillation(
            *leaves, indices, log_probs, labels, **options, chunk_size=4, impl=impl
        )
        torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=0)
        for got, wanted in zip(found[1:4], metrics, strict=True):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-9)
        assert_near(differentiate(found.loss, *leaves), differentiate(expected, *leaves), 1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_entries_that_are_none(impl):
    hidden, weight, teacher, labels = make()
    indices, log_probs = cached(teacher, 8)
    for row in range(19):
        # of some rows nothing is left
        gone = torch.randperm(8, generator=torch.Generator().manual_seed(row))[: row % 9]
        indices[row, gone], log_probs[row, gone] = -1, 7.0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    expected, *_ = naive(*leaves, labels, indices, log_probs, kd_weight=0.7)
    found = sparse_distillation(*leaves, indices, log_probs, labels, kd_weight=0.7, impl=impl)
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=0)
    assert_near(differentiate(found.loss, *leaves), differentiate(expected, *leaves), 1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_vocabulary_is_dense_distillation(impl, dtype, temperature):
    hidden, weight, teacher, labels = make(dtype=dtype)
    # a teacher whose head is the identity has these logits
    matrix = torch.eye(31, dtype=dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    options = {"kd_weight": 0.6, "temperature": temperature, "impl": impl}
    dense = fused_linear_distillation(*leaves, teacher.to(dtype), matrix, labels, **options)
    indices, log_probs = cached(teacher.to(dtype), 31, temperature)
    found = sparse_distillation(*leaves, indices, log_probs, labels, **options)
    tolerance = 1e-12 if dtype == F64 else 1e-6
    for got, wanted in zip(found, dense, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert_near(
        differentiate(found.loss, *leaves), differentiate(dense.loss, *leaves), 10 * tolerance
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_small_tail_is_not_lost_to_rounding(impl):
    # of the student 1e-7 is off the indices: a difference from 1 would have no digit left
    hidden, weight, _, labels = make(4, 31, ignored=0.0, dtype=torch.float32)
    _, token = (hidden @ weight.T).topk(3)
    other = torch.stack([torch.full((31,), -20.0).index_fill(0, t, 0.0) for t in token])
    hidden, weight = other, torch.eye(31)
    indices, log_probs = token.int(), torch.full((4, 3), 0.9 / 3).log()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    expected, *_ = naive(*leaves, labels, indices, log_probs, kd_weight=1.0)
    found = sparse_distillation(*leaves, indices, log_probs, labels, kd_weight=1.0, impl=impl)
    bound = 1e-5
    torch.testing.assert_close(found.loss.double(), expected, rtol=bound, atol=0)
    assert_near(differentiate(found.loss, *leaves), differentiate(expected, *leaves), bound)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_student_that_rules_the_tail_out_is_told_so(impl):
    # what it gives the tail, e^-200, is no float32
    hidden = torch.full((2, 5), -200.0)
    hidden[:, :2] = 0.0
    hidden.requires_grad_()
    found = sparse_distillation(
        hidden, torch.eye(5), torch.tensor([[0, 1]] * 2), torch.full((2, 2), 0.4).log(),
        torch.zeros(2).long(), kd_weight=1.0, reduction="sum", impl=impl,
    )  # fmt: skip
    cross = 2 * (0.8 * math.log(2) + 0.2 * (200 + math.log(2) - math.log(3)))
    assert found.loss.item() == pytest.approx(cross, rel=1e-5)
    (gradient,) = differentiate(found.loss, hidden)
    expected = torch.tensor([0.1, 0.1, -0.2 / 3, -0.2 / 3, -0.2 / 3]).repeat(2, 1)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradcheck_of_the_definition():
    hidden, weight, teacher, labels = make(5, 7, 3)
    indices, log_probs = cached(teacher, 3)
    indices[1, 2] = -1
    row_weights = torch.rand(2, 5, dtype=F64)
    for tail in (True, False):

        def loss(hidden, weight, tail=tail):
            terms = reference.sparse_row_terms(
                hidden @ weight.T, indices, log_probs, labels, 2.0, IGNORED, tail
            )
            return reference.combine(terms, *row_weights, 2.0)

        assert torch.autograd.gradcheck(loss, [hidden.requires_grad_(), weight.requires_grad_()])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_the_function(impl, weighted):
    hidden, weight, teacher, labels = make(5, 7, 3)
    indices, log_probs = cached(teacher, 3)
    known = {"log_probs": log_probs}
    if weighted:
        indices[:, 2] = indices[:, 0]
        known = {"log_probs": None, "weights": log_probs.exp()}

    def loss(hidden, weight):
        return sparse_distillation(
            hidden, weight, indices, labels=labels, **known, kd_weight=0.6, temperature=1.5,
            chunk_size=2, impl=impl,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [hidden.requires_grad_(), weight.requires_grad_()])


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_against_their_formula(impl):
    hidden, weight, teacher, labels = make()
    generator = torch.Generator().manual_seed(0)
    indices, weights = sample_teacher(teacher, 12, generator, power=0.7)
    assert any(len(set(row.tolist())) < 12 for row in indices)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    s = leaves[0] @ leaves[1].T
    cross = -(weights * log_softmax(s, -1).gather(1, indices.long())).sum(-1)
    kept = labels != IGNORED
    expected = 0.5 * cross_entropy(s, labels, ignore_index=IGNORED) + 0.5 * cross[kept].mean()
    found = sparse_distillation(
        *leaves, indices, None, labels, weights=weights, kd_weight=0.5, impl=impl
    )
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.cross_entropy, cross[kept].mean().detach())
    assert (found.kl, found.entropy, found.agreement) == (None, None, None)
    assert_near(differentiate(found.loss, *leaves), differentiate(expected, *leaves), 1e-12)


def mean_gradient(draw, repeats, *, hidden, weight, labels):
    """Mean and its standard error of the gradient of the states over draws."""
    found = []
    for _ in range(repeats):
        indices, weights = draw()
        loss = sparse_distillation(
            hidden, weight, indices, None, labels, weights=weights, kd_weight=1.0
        ).loss
        found.append(differentiate(loss, hidden)[0])
    stack = torch.stack(found)
    return stack.mean(0), stack.std(0) / repeats**0.5


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_sampling_has_the_whole_gradient_as_expectation(power):
    hidden, weight, teacher, labels = make(6, 31, 4, ignored=0.0)
    hidden.requires_grad_()
    dense = fused_linear_distillation(
        hidden, weight, teacher, torch.eye(31, dtype=F64), labels, kd_weight=1.0
    )
    (whole,) = differentiate(dense.loss, hidden)
    generator = torch.Generator().manual_seed(5)
    given = {"hidden": hidden, "weight": weight, "labels": labels}
    mean, error = mean_gradient(
        lambda: sample_teacher(teacher, 5, generator, power=power), 2000, **given
    )
    distance = (mean - whole) / error
    # mean square of 24 standard normal numbers, and the largest of them
    assert distance.square().mean() < 1 + 3 * (2 / distance.numel()) ** 0.5
    assert distance.abs().max() < 4
    # normalised top-k of as many tokens is biased, and the bound sees it
    log_probs, indices = log_softmax(teacher, -1).topk(5)
    loss = sparse_distillation(
        hidden, weight, indices, None, labels, weights=torch.softmax(log_probs, -1), kd_weight=1.0
    ).loss
    biased = (differentiate(loss, hidden)[0] - whole) / error
    assert biased.square().mean() > 10


def test_sampling_repeats_and_follows_the_law():
    teacher = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).repeat(3, 1)
    first = sample_teacher(teacher, 20000, torch.Generator().manual_seed(1), temperature=2.0)
    again = sample_teacher(teacher, 20000, torch.Generator().manual_seed(1), temperature=2.0)
    assert torch.equal(first.indices, again.indices)
    assert first.indices.dtype == torch.int32
    assert (first.weights == 1 / 20000).all()
    for power in (1.0, 0.5):
        indices, weights = sample_teacher(
            teacher, 20000, torch.Generator().manual_seed(2), temperature=2.0, power=power
        )
        mass = torch.zeros(3, 4).scatter_add_(1, indices.long(), weights)
        torch.testing.assert_close(mass, torch.softmax(teacher / 2, -1), rtol=0, atol=0.02)
    assert sample_teacher(teacher[:0], 4).indices.shape == (0, 4)


def test_repeats_are_merged():
    indices = torch.tensor([[3, 1, 3, -1, 3], [2, 2, 2, 2, 2], [-1, -1, 0, 4, 0]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 9.0, 0.4], [1.0] * 5, [5.0, 5.0, 0.25, 0.5, 0.25]])
    token, logs = merge_repeats(indices, weights.log())
    for row in range(3):
        found = {
            t: w
            for t, w in zip(token[row].tolist(), logs[row].exp().tolist(), strict=True)
            if t >= 0
        }
        expected = [{1: 0.2, 3: 0.8}, {2: 5.0}, {0: 0.5, 4: 0.5}][row]
        assert found == pytest.approx(expected)
        assert sum(t >= 0 for t in token[row].tolist()) == len(expected)


@settings(deadline=None, max_examples=20, derandomize=True, database=None)
@given(
    rows=st.integers(1, 6), vocabulary=st.integers(1, 20), share=st.floats(0, 1),
    chunk=st.integers(1, 7),
)  # fmt: skip
def test_odd_shapes(rows, vocabulary, share, chunk):
    hidden, weight, teacher, labels = make(rows, vocabulary, ignored=0.0)
    indices, log_probs = cached(teacher, max(1, round(share * vocabulary)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    expected, *_ = naive(*leaves, labels, indices, log_probs, kd_weight=0.5)
    found = sparse_distillation(
        *leaves, indices, log_probs, labels, kd_weight=0.5, chunk_size=chunk
    )
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    assert_near(differentiate(found.loss, *leaves), differentiate(expected, *leaves), 1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_label(impl):
    hidden, weight, teacher, labels = make()
    indices, log_probs = cached(teacher, 4)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    given = (*leaves, indices, log_probs, labels)
    found = sparse_distillation(*given, kd_weight=0.5, impl=impl)
    (d_hidden,) = differentiate(found.loss, hidden)
    assert torch.equal((d_hidden == 0).all(-1), labels == IGNORED)
    all_rows = naive(*leaves, labels, indices, log_probs, kd_weight=0.5, rows=torch.arange(19))
    found = sparse_distillation(*given, kd_weight=0.5, distill_ignored=True, impl=impl)
    torch.testing.assert_close(found.loss, all_rows[0], rtol=1e-11, atol=0)
    nothing = torch.full_like(labels, IGNORED)
    found = sparse_distillation(*given[:-1], nothing, kd_weight=0.5, impl=impl)
    assert found.loss.item() == 0
    assert all((g == 0).all() for g in differentiate(found.loss, *leaves))
    nobody = (hidden[:0], weight, indices[:0], log_probs[:0], labels[:0])
    assert sparse_distillation(*nobody, kd_weight=0.5, impl=impl).loss.item() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16(impl):
    hidden, weight, teacher, labels = make(64, 500, 32, dtype=torch.bfloat16)
    weight = weight / 4
    indices, log_probs = cached(teacher, 16)
    log_probs = log_probs.float()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected, *_ = naive(*wide, labels, indices, log_probs, kd_weight=0.8)
    found = sparse_distillation(*leaves, indices, log_probs, labels, kd_weight=0.8, impl=impl)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=0)
    assert_near(differentiate(found.loss, *leaves), differentiate(expected, *wide), 3e-3)


BAD = {
    "shape": ({"log_probs": torch.zeros(6, 2)}, ValueError, r"log_probs: expected shape \(6, 4\)"),
    "dtype": ({"indices": torch.zeros(6, 4)}, TypeError, "indices: expected int32 or int64"),
    "none": ({"log_probs": None}, ValueError, "log_probs: expected one of log_probs and weights"),
    "both": ({"weights": torch.ones(6, 4)}, ValueError, "got str 'both'; pass log_probs of top-k"),
    "twice": ({"indices": torch.ones(6, 4).int()}, ValueError, "tokens that differ in row 0"),
    "token": (
        {"indices": torch.tensor([[0, 1, 2, 31]] * 6)}, ValueError, r"indices: .*\[0, 31\).* 31;",
    ),
    "label": ({"labels": torch.full((6,), 31)}, ValueError, "labels: .*got int 31"),
    "k": (
        {"indices": torch.zeros(6, 0).int(), "log_probs": torch.zeros(6, 0)}, ValueError,
        "at least one token a row",
    ),
    "lambda": ({"kd_weight": -0.1}, ValueError, r"kd_weight: .*got float -0\.1"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature: expected a positive"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, match = BAD[name]
    hidden, weight, teacher, labels = make(6, ignored=0.0)
    indices, log_probs = cached(teacher, 4)
    a = {"hidden": hidden, "weight": weight, "indices": indices, "log_probs": log_probs}
    with pytest.raises(error, match=match):
        sparse_distillation(**(a | {"labels": labels, "kd_weight": 0.5} | change))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rounds": 0}, ValueError, "rounds: expected an integer"),
        ({"power": 0.0}, ValueError, "power: expected a positive number"),
        ({"logits": torch.zeros(2, 3).int()}, TypeError, "logits: expected float32"),
    ],
)
def test_bad_input_of_sampling(change, error, match):
    with pytest.raises(error, match=match):
        sample_teacher(**({"logits": torch.zeros(2, 3), "rounds": 2} | change))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", [True, False])
def test_op_checklist(impl, tail):
    def make_args(size):
        hidden, weight, teacher, labels = make(size, dtype=torch.float32)
        indices, log_probs = cached(teacher, 5)
        active = torch.arange(size) % 3 != 1
        weights = torch.rand(2, size, generator=torch.Generator().manual_seed(3))
        options = (2.0, IGNORED, tail, 4, True, True, impl)
        return hidden, weight, indices, log_probs.float(), labels, active, *weights, *options

    check_op(op.sparse_distillation, make_args, sizes=[13, 0, 1, 17])
