"""Distillation of a linear head, against autograd of the written-out loss in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.distill import (
    chunks,
    fused_linear_distillation,
    fused_linear_distillation_heads,
    op,
    reference,
)
from shared_kernels.testing import check_op
from torch.nn.functional import cross_entropy

F64 = torch.float64
IGNORED = -100


def make(rows=23, vocabulary=37, width=8, *, teacher=(37, 12), ignored=0.3, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher_vocabulary, teacher_width = teacher

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(dtype)

    labels = torch.randint(0, min(vocabulary, teacher_vocabulary), (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return {
        "hidden": draw(rows, width),
        "weight": draw(vocabulary, width, scale=0.7),
        "teacher_hidden": draw(rows, teacher_width),
        "teacher_weight": draw(teacher_vocabulary, teacher_width, scale=0.7),
        "labels": labels,
    }


def naive(a, *, kd_weight, temperature=1.0, count=None, kd_rows=None):
    """The loss of `a`, from the formulas, in float64; differentiable. Means over `count` rows."""
    used = min(len(a["weight"]), len(a["teacher_weight"]))
    s = a["hidden"].double() @ a["weight"].double()[:used].T
    t = a["teacher_hidden"].double() @ a["teacher_weight"].double()[:used].T
    labels = a["labels"]
    rows = (labels != IGNORED) if kd_rows is None else kd_rows
    lm_count = max(1, int((labels != IGNORED).sum())) if count is None else count
    kd_count = max(1, int(rows.sum())) if count is None else count
    lm = cross_entropy(s, labels, reduction="sum", ignore_index=IGNORED) / lm_count
    q = torch.exp(t / temperature) / torch.exp(t / temperature).sum(-1, keepdim=True)
    p = torch.exp(s / temperature) / torch.exp(s / temperature).sum(-1, keepdim=True)
    cross = -(q * p.log()).sum(-1)[rows].sum() / kd_count
    entropy = -(q * q.log()).sum(-1)[rows].sum() / kd_count
    same = (s.argmax(-1) == t.argmax(-1))[rows].double().sum() / kd_count
    loss = (1 - kd_weight) * lm + kd_weight * temperature**2 * cross
    return {
        "loss": loss, "lm": lm, "kl": cross - entropy, "entropy": entropy, "agreement": same,
        "cross_entropy": cross,
    }  # fmt: skip


def differentiate(loss, *inputs, **kwargs):
    return torch.autograd.grad(loss, inputs, **kwargs)


def on(device, a):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in a.items()}


def assert_right(a, impl, *, tolerance, device="cpu", kd_rows=None, count=None, **options):
    """Compare loss, metrics and gradients with the naive ones."""
    a = on("cpu", a)
    wide = {k: a[k].double().requires_grad_() for k in ("hidden", "weight")}
    naive_options = {k: options[k] for k in ("kd_weight", "temperature") if k in options}
    expected = naive(a | wide, **naive_options, kd_rows=kd_rows, count=count)
    wanted = differentiate(expected["loss"], *wide.values())
    own = on(device, a)
    leaves = {k: own[k].detach().requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(**(own | leaves), **options, impl=impl)
    gradients = differentiate(found.loss, *leaves.values())
    for name, value in expected.items():
        got = getattr(found, name).detach().cpu().double()
        torch.testing.assert_close(got, value.detach(), rtol=tolerance, atol=tolerance, msg=name)
    for name, got, value in zip(leaves, gradients, wanted, strict=True):
        assert got.dtype == a[name].dtype
        error = (got.cpu().double() - value).norm()
        assert error <= 10 * tolerance * value.norm() + 1e-14, f"{name}: {error / value.norm():.2e}"
    return found


IMPLS = ["reference", "split"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 0.75, 1.0])
def test_against_autograd_of_the_written_out_loss(impl, kd_weight, temperature):
    for teacher in ((37, 12), (50, 12), (30, 5)):
        options = {"kd_weight": kd_weight, "temperature": temperature, "chunk_size": 5}
        assert_right(make(teacher=teacher), impl, tolerance=1e-12, **options)
        assert_right(make(teacher=teacher, dtype=torch.float32), impl, tolerance=1e-6, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(impl):
    a = make()
    options = {"kd_weight": 0.6, "temperature": 2.0, "tolerance": 1e-12, "chunk_size": 7}
    assert_right(a, impl, **options, reduction="sum", count=1)
    assert_right(a, impl, **options, num_items=41, count=41)
    assert_right(a, impl, **options, num_items=torch.tensor(41), count=41)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_items", [None, 50])
def test_rows_without_a_label_can_be_distilled(impl, num_items):
    a = make()
    assert_right(
        a, impl, tolerance=1e-12, kd_weight=0.6, distill_ignored=True, num_items=num_items,
        count=num_items, kd_rows=torch.ones(23, dtype=torch.bool), chunk_size=6,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_label_are_not_even_read(impl):
    a = make(dtype=torch.float32)
    clean = fused_linear_distillation(**a, kd_weight=0.5, impl=impl)
    for name in ("hidden", "teacher_hidden"):
        a[name][a["labels"] == IGNORED] = float("nan")
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(**(a | leaves), kd_weight=0.5, impl=impl)
    torch.testing.assert_close(found.loss.detach(), clean.loss)
    d_hidden, d_weight = differentiate(found.loss, *leaves.values())
    assert (d_hidden[a["labels"] == IGNORED] == 0).all()
    assert d_weight.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 9])
def test_no_row_counts(impl, rows):
    a = make(rows, ignored=2.0)
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(**(a | leaves), kd_weight=0.5, impl=impl)
    assert [value.item() for value in found] == [0.0] * 6
    for gradient in differentiate(found.loss, *leaves.values()):
        assert (gradient == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_distillation_it_is_cross_entropy(impl):
    a = make(dtype=torch.float32)
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(**(a | leaves), kd_weight=0.0, chunk_size=4, impl=impl)
    logits = leaves["hidden"] @ leaves["weight"].T
    expected = cross_entropy(logits, a["labels"], ignore_index=IGNORED)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    for got, wanted in zip(
        differentiate(found.loss, *leaves.values()),
        differentiate(expected, *leaves.values()),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_like_its_teacher_learns_nothing(impl, temperature):
    a = make(dtype=torch.float32, ignored=0.0)
    a |= {"teacher_hidden": a["hidden"].clone(), "teacher_weight": a["weight"].clone()}
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(
        **(a | leaves), kd_weight=1.0, temperature=temperature, impl=impl
    )
    assert found.kl.item() == 0.0
    assert found.agreement.item() == 1.0
    assert all((g == 0).all() for g in differentiate(found.loss, *leaves.values()))


def test_gradcheck_of_the_definition():
    a = make(5, 7, 3, teacher=(9, 4))
    weights = torch.rand(2, 5, dtype=F64)

    def loss(hidden, weight):
        s, t = hidden @ weight.T, a["teacher_hidden"] @ a["teacher_weight"][:7].T
        terms = reference.row_terms(s, t, a["labels"].clamp(max=6), 2.0, IGNORED)
        return reference.combine(terms, *weights, 2.0)

    leaves = [a[k].requires_grad_() for k in ("hidden", "weight")]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_of_the_function(impl):
    a = make(5, 7, 3, teacher=(9, 4), ignored=0.2)
    a["labels"][0] = IGNORED

    def loss(hidden, weight):
        b = a | {"hidden": hidden, "weight": weight}
        return fused_linear_distillation(
            **b, kd_weight=0.7, temperature=1.5, chunk_size=2, impl=impl
        ).loss

    leaves = [a[k].requires_grad_() for k in ("hidden", "weight")]
    assert torch.autograd.gradcheck(loss, leaves)


def test_chunks_do_not_change_the_result():
    a = make(2100, 311, 24, teacher=(311, 32), dtype=torch.float32)
    runs = []
    for chunk in (64, 2048, 2100, None):
        leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
        found = fused_linear_distillation(
            **(a | leaves), kd_weight=0.75, chunk_size=chunk, impl="split"
        )
        runs.append((found.loss.detach(), *differentiate(found.loss, *leaves.values())))
    for run in runs[1:]:
        torch.testing.assert_close(run[0], runs[0][0], rtol=1e-6, atol=0)
        for got, wanted in zip(run[1:], runs[0][1:], strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_rows_fit_into_the_budget():
    for vocabulary in (7, 49152, 151936):
        for dtype in (torch.float32, torch.bfloat16):
            rows = chunks.chunk_rows(0, vocabulary, dtype, torch.device("cpu"))
            bytes_of_row = vocabulary * (8 + (dtype == torch.bfloat16) * 2)
            assert 0 < rows * bytes_of_row <= chunks.BUDGET["cpu"]
    assert chunks.chunk_rows(0, 1 << 30, torch.float32, torch.device("cpu")) == 1
    assert chunks.chunk_rows(17, 1 << 30, torch.float32, torch.device("cpu")) == 17


MEMORY = """
import sys
from pathlib import Path

import torch
from shared_kernels.ops.distill import fused_linear_distillation
from torch.nn.functional import cross_entropy, kl_div, log_softmax

hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(16384, 64)
weight.requires_grad_()
teacher, labels = torch.randn(512, 80), torch.randint(0, 16384, (512,))
matrix = torch.randn(16384, 80)


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ours(rows=512):
    found = fused_linear_distillation(
        hidden[:rows], weight, teacher[:rows], matrix, labels[:rows], kd_weight=0.5, chunk_size=32
    )
    torch.autograd.grad(found.loss, (hidden, weight))


def naive(rows=512):
    s, t = hidden[:rows] @ weight.T, teacher[:rows] @ matrix.T
    logq = log_softmax(t, -1)
    loss = cross_entropy(s, labels[:rows]) + kl_div(log_softmax(s, -1), logq, log_target=True)
    torch.autograd.grad(loss, (hidden, weight))


run = {"ours": ours, "naive": naive}[sys.argv[1]]
run(1)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
run()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_on_a_cpu():
    grown = {}
    for name in ("ours", "naive"):
        command = [sys.executable, "-c", MEMORY, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout)
    # three of its four or more blocks of 32 MiB are resident at once
    assert grown["naive"] > 3 * 32768
    assert grown["ours"] <= grown["naive"] / 6


# --- 16 bits ------------------------------------------------------------------------------------

#: Of the teacher's states; KL falls from 5 to 0.005.
NOISE = [2.4, 0.5, 0.16, 0.05]


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("noise", NOISE)
def test_bfloat16_gradients_are_right_however_close_the_teacher(noise):
    check_precision(noise, "cpu", "split", rows=96, vocabulary=4000)


def check_precision(noise, device, impl, *, rows, vocabulary, width=128):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 2 * width**-0.5
    near = hidden + noise * torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    a = dict(zip(names, (x.bfloat16() for x in (hidden, weight, near, weight)), strict=True))
    a["labels"] = labels
    wide = {k: a[k].double().requires_grad_() for k in ("hidden", "weight")}
    expected = naive(a | wide, kd_weight=1.0)
    wanted = differentiate(expected["loss"], *wide.values())
    own = on(device, a)
    leaves = {k: own[k].requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(**(own | leaves), kd_weight=1.0, impl=impl)
    for got, value in zip(differentiate(found.loss, *leaves.values()), wanted, strict=True):
        assert relative(got.cpu(), value) <= 3e-3
    assert abs(found.kl.item() - expected["kl"].item()) <= 1e-4 * expected["kl"].item() + 1e-6
    # the same with logits of 16 bits, which the bound above must not let through
    s, t = (
        (a[h].float() @ a[w].float().T).bfloat16().float()
        for h, w in (("hidden", "weight"), ("teacher_hidden", "teacher_weight"))
    )
    slope = (torch.softmax(s, -1) - torch.softmax(t, -1)) / rows
    assert relative(slope @ a["weight"].float(), wanted[0]) > 3e-3
    return expected["kl"].item()


def test_the_ladder_spans_the_divergences():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 128, generator=generator)
    weight = torch.randn(4000, 128, generator=generator) * 2 * 128**-0.5
    found = []
    for noise in (NOISE[0], NOISE[-1]):
        near = hidden + noise * torch.randn(96, 128, generator=generator)
        p, q = (torch.log_softmax(x.double() @ weight.double().T, -1) for x in (hidden, near))
        found.append((q.exp() * (q - p)).sum(-1).mean().item())
    assert found[0] > 4
    assert found[1] < 0.006


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_gradients_do_not_underflow(impl):
    a = make(64, 4000, 16, teacher=(4000, 16), dtype=torch.float16, ignored=0.0)
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    found = fused_linear_distillation(**(a | leaves), kd_weight=0.75, num_items=1 << 20, impl=impl)
    scale = torch.tensor(65536.0)  # of a gradient scaler
    gradients = differentiate(found.loss, *leaves.values(), grad_outputs=scale)
    wide = {k: a[k].detach().double().requires_grad_() for k in ("hidden", "weight")}
    expected = naive(a | wide, kd_weight=0.75, count=1 << 20)["loss"] * 65536
    for got, wanted in zip(gradients, differentiate(expected, *wide.values()), strict=True):
        assert relative(got, wanted) <= 2e-3


# --- autograd -----------------------------------------------------------------------------------


def test_backward_scales_and_leaves_what_is_kept_alone():
    a = make(dtype=torch.float32)
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    loss = fused_linear_distillation(**(a | leaves), kd_weight=0.5).loss
    once = differentiate(loss, *leaves.values(), retain_graph=True)
    loss.backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    again = differentiate(loss, *leaves.values(), retain_graph=True)
    for leaf, first, second in zip(leaves.values(), once, again, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(leaf.grad, 4 * first)
    half = differentiate(-0.5 * loss, *leaves.values())
    for got, first in zip(half, once, strict=True):
        torch.testing.assert_close(got, -0.5 * first)


def test_a_second_derivative_is_refused():
    a = make()
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "weight")}
    loss = fused_linear_distillation(**(a | leaves), kd_weight=0.5).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        differentiate(loss, *leaves.values(), create_graph=True)


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ()])
def test_only_gradients_that_are_wanted_are_made(wanted, monkeypatch):
    a = make()
    full = {k: a[k].clone().requires_grad_() for k in ("hidden", "weight")}
    expected = fused_linear_distillation(**(a | full), kd_weight=0.5)
    gradients = dict(zip(full, differentiate(expected.loss, *full.values()), strict=True))
    sizes = []
    original = op.linear_distillation

    def spy(*args):
        stats, d_hidden, d_weight = original(*args)
        sizes.append((len(d_hidden) > 0, d_weight.numel() > 0))
        return stats, d_hidden, d_weight

    monkeypatch.setattr(op, "linear_distillation", spy)
    leaves = {k: a[k].clone().requires_grad_() for k in wanted}
    found = fused_linear_distillation(**(a | leaves), kd_weight=0.5)
    assert sizes == [("hidden" in wanted, "weight" in wanted)]
    assert found.loss.requires_grad == bool(wanted)
    assert not any(x.requires_grad for x in found[1:])
    torch.testing.assert_close(found.loss.detach(), expected.loss.detach())
    for name, leaf in leaves.items():
        (got,) = differentiate(found.loss, leaf)
        torch.testing.assert_close(got, gradients[name])
    with torch.no_grad():
        fused_linear_distillation(**(a | full), kd_weight=0.5)
    assert sizes[-1] == (False, False)


def test_the_teacher_gets_no_gradient():
    a = make()
    leaves = {k: a[k].requires_grad_() for k in ("hidden", "teacher_hidden", "teacher_weight")}
    fused_linear_distillation(**(a | leaves), kd_weight=0.5).loss.backward()
    assert leaves["hidden"].grad is not None
    assert leaves["teacher_hidden"].grad is None
    assert leaves["teacher_weight"].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_round_the_logits(impl):
    a = make(dtype=torch.float32)
    expected = fused_linear_distillation(**a, kd_weight=0.5, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_linear_distillation(**a, kd_weight=0.5, impl=impl)
    assert torch.equal(found.loss, expected.loss)


def test_a_teacher_may_run_in_inference_mode():
    a = make(dtype=torch.float32)
    expected = fused_linear_distillation(**a, kd_weight=0.5).loss
    with torch.inference_mode():
        own = {k: a[k].clone() for k in ("teacher_hidden", "teacher_weight")}
    hidden = a["hidden"].requires_grad_()
    loss = fused_linear_distillation(**(a | own), kd_weight=0.5).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert hidden.grad.isfinite().all()


def test_it_compiles():
    a = make(12, dtype=torch.float32)
    torch.compiler.reset()

    def step(hidden, weight):
        b = a | {"hidden": hidden, "weight": weight}
        return fused_linear_distillation(**b, kd_weight=0.5).loss * 2

    leaves = [a[k].requires_grad_() for k in ("hidden", "weight")]
    expected = step(*leaves)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(
        differentiate(found, *leaves), differentiate(expected, *leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


# --- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_need_not_be_contiguous(impl):
    a = make(ignored=0.2)
    b = {
        "hidden": a["hidden"].T.contiguous().T,
        "weight": torch.cat([a["weight"]] * 2, 1)[:, : a["weight"].shape[1]],
        "teacher_hidden": a["teacher_hidden"].repeat_interleave(2, 0)[::2],
        "teacher_weight": a["teacher_weight"].T.contiguous().T,
        "labels": a["labels"].repeat_interleave(3)[::3],
    }
    assert not any(x.is_contiguous() for x in b.values())
    assert_right(b, impl, tolerance=1e-12, kd_weight=0.5, chunk_size=4)
    expanded = a | {"hidden": a["hidden"][:1].expand(23, -1)}
    assert_right(expanded, impl, tolerance=1e-12, kd_weight=0.5)


def test_a_teacher_may_have_its_own_precision():
    a = make(dtype=torch.float32)
    for name in ("teacher_hidden", "teacher_weight"):
        a[name] = a[name].bfloat16()
    assert_right(a, "split", tolerance=1e-6, kd_weight=0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_not_a_number_stays_in_its_row(impl):
    a = make(6, dtype=torch.float32, ignored=0.0)
    a["hidden"][2] = float("nan")
    hidden = a["hidden"].requires_grad_()
    loss = fused_linear_distillation(**a, kd_weight=0.5, reduction="sum", impl=impl).loss
    (d_hidden,) = differentiate(loss, hidden)
    assert d_hidden.isnan().all(-1).tolist() == [row == 2 for row in range(6)]


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9), vocabulary=st.integers(1, 30), teacher=st.integers(1, 30),
    width=st.integers(1, 6), chunk=st.integers(1, 10),
)  # fmt: skip
def test_odd_shapes(rows, vocabulary, teacher, width, chunk):
    a = make(rows, vocabulary, width, teacher=(teacher, 3))
    assert_right(a, "split", tolerance=1e-11, kd_weight=0.4, temperature=3.0, chunk_size=chunk)


BAD = {
    "width": ({"weight": torch.zeros(5, 3, dtype=F64)}, ValueError, r"weight: .* \(any, 8\)"),
    "rows": ({"teacher_hidden": torch.zeros(2, 12, dtype=F64)}, ValueError, "teacher_hidden: exp"),
    "teacher width": ({"teacher_weight": torch.zeros(5, 3, dtype=F64)}, ValueError, "teacher_we"),
    "dtype": ({"weight": torch.zeros(5, 8)}, TypeError, "weight: expected float64, got float32"),
    "precision": (
        {"teacher_hidden": torch.zeros(6, 12)}, TypeError, "teacher_hidden: expected float64",
    ),
    "integers": ({"hidden": torch.zeros(6, 8).int()}, TypeError, "hidden: expected float32 or"),
    "labels": ({"labels": torch.zeros(6)}, TypeError, "labels: expected int64, got float32"),
    "count": ({"labels": torch.zeros(2).long()}, ValueError, r"labels: expected shape \(6,\)"),
    "label": (
        {"labels": torch.full((6,), 37)}, ValueError, r"labels: .*\[0, 37\), or -100, got int 37",
    ),
    "negative label": ({"labels": torch.full((6,), -1)}, ValueError, "got int -1; pad with"),
    "empty": ({"weight": torch.zeros(0, 8, dtype=F64)}, ValueError, "at least one token"),
    "lambda": ({"kd_weight": 1.5}, ValueError, r"kd_weight: .*\[0, 1\], got float 1.5; 0 is the"),
    "lambda nan": ({"kd_weight": float("nan")}, ValueError, "kd_weight: .*nan"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: .*got float 0"),
    "reduction": ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum"),
    "items": ({"num_items": 0}, ValueError, "num_items: expected a positive number, got int 0"),
    "items of a vector": ({"num_items": torch.ones(2)}, ValueError, "num_items: .*0-dim"),
    "both": ({"num_items": 2, "reduction": "sum"}, ValueError, "num_items: .*leave reduction out"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size: expected an integer"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, match = BAD[name]
    with pytest.raises(error, match=match):
        fused_linear_distillation(**(make(6) | {"kd_weight": 0.5} | change))


# --- several heads ------------------------------------------------------------------------------


def naive_heads(a, hiddens, labels, rows, *, kd_weights, head_weights, temperature):
    total = 0.0
    for hidden, label, row, kd, head in zip(
        hiddens, labels, rows, kd_weights, head_weights, strict=True
    ):
        label = torch.where(row < 0, IGNORED, label)
        own = a | {"hidden": hidden, "labels": label}
        own["teacher_hidden"] = a["teacher_hidden"][row.clamp_min(0)]
        total = total + head * naive(own, kd_weight=kd, temperature=temperature)["loss"]
    return total


def sequences(lengths, depth, generator, vocabulary=37):
    """Labels and teacher rows of packed sequences for the backbone and a module of each depth."""
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=generator)
    labels, rows = [], []
    for k in range(depth + 1):
        label, row = torch.full_like(tokens, IGNORED), torch.full_like(tokens, -1)
        start = 0
        for length in lengths:
            for i in range(length):
                if i + k + 1 < length:
                    label[start + i] = tokens[start + i + k + 1]
                    row[start + i] = start + i + k
            start += length
        labels.append(label)
        rows.append(row)
    return labels, rows


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk", [1, 4, 7, None])
def test_heads_against_calls_of_their_own(impl, chunk):
    generator = torch.Generator().manual_seed(1)
    a = make(23, teacher=(50, 12))
    labels, rows = sequences((9, 1, 13), 2, generator)
    hiddens = [torch.randn(23, 8, generator=generator, dtype=F64) for _ in range(3)]
    # one head whose rows are in no order, repeat, and are fewer
    hiddens.append(torch.randn(17, 8, generator=generator, dtype=F64))
    rows.append(torch.randint(-1, 5, (17,), generator=generator))
    labels.append(torch.randint(0, 37, (17,), generator=generator))
    options = {"kd_weights": [0.7, 0.3, 1.0, 0.5], "head_weights": [1.0, 0.3, 0.1, 2.0]}
    for x in (*hiddens, a["weight"]):
        x.requires_grad_()
    expected = naive_heads(a, hiddens, labels, rows, temperature=2.0, **options)
    found = fused_linear_distillation_heads(
        hiddens, a["weight"], a["teacher_hidden"], a["teacher_weight"], labels, rows=rows,
        kd_weight=options["kd_weights"], head_weights=options["head_weights"], temperature=2.0,
        chunk_size=chunk, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(head.loss for head in found.heads), found.loss.detach())
    leaves = (*hiddens, a["weight"])
    for got, wanted in zip(
        differentiate(found.loss, *leaves), differentiate(expected, *leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


def test_a_teacher_row_is_made_once_for_all_heads(monkeypatch):
    a = make(20, ignored=0.0)
    made = []
    original = chunks.multiply

    def spy(x, y, out):
        made.append((len(x), x.shape[1]))
        original(x, y, out)

    monkeypatch.setattr(chunks, "multiply", spy)
    rows = [torch.arange(20), torch.arange(1, 21)]
    rows[1][-1] = -1
    with torch.no_grad():
        fused_linear_distillation_heads(
            [a["hidden"], a["hidden"]], a["weight"], a["teacher_hidden"], a["teacher_weight"],
            [a["labels"], a["labels"]], rows=rows, kd_weight=1.0, chunk_size=6, impl="split",
        )  # fmt: skip
    assert sum(count for count, width in made if width == 12) == 20
    assert sum(count for count, width in made if width == 8) == 39


def test_no_head_sees_another_sequence():
    generator = torch.Generator().manual_seed(2)
    lengths = (6, 5)
    labels, rows = sequences(lengths, 1, generator)
    a = make(11, ignored=0.0)
    hidden = a["hidden"].requires_grad_()
    found = fused_linear_distillation_heads(
        [a["hidden"].detach(), hidden], a["weight"], a["teacher_hidden"], a["teacher_weight"],
        labels, rows=rows, kd_weight=0.5,
    )  # fmt: skip
    (gradient,) = differentiate(found.loss, hidden)
    # the last two rows of each sequence have no token two places on
    assert (gradient == 0).all(-1).nonzero()[:, 0].tolist() == [4, 5, 9, 10]


HEADS_BAD = {
    "none": ({"hidden": [], "labels": [], "rows": []}, "labels: expected as many as hidden"),
    "labels": ({"labels": [torch.zeros(6).long()]}, "labels: expected as many as hidden, 2 > 0"),
    "rows": ({"rows": [torch.arange(6), torch.arange(5)]}, r"rows\[1\]: expected shape \(6,\)"),
    "row": (
        {"rows": [torch.arange(6), torch.arange(6) + 1]},
        r"rows: .*\[0, 6\), or -1, got int 6",
    ),
    "weights": ({"head_weights": [1.0]}, "head_weights: expected as many"),
    "negative": ({"head_weights": [1.0, -1.0]}, "head_weights: expected numbers >= 0"),
}


@pytest.mark.parametrize("name", HEADS_BAD)
def test_bad_input_of_heads(name):
    change, match = HEADS_BAD[name]
    a = make(6, ignored=0.0)
    a = a | {"hidden": [a["hidden"]] * 2, "labels": [a["labels"]] * 2}
    a = a | {"rows": [torch.arange(6)] * 2, "kd_weight": 0.5} | change
    with pytest.raises(ValueError, match=match):
        fused_linear_distillation_heads(**a)


# --- the op -------------------------------------------------------------------------------------


def op_arguments(size, device="cpu", dtype=torch.float32, impl="split"):
    a = on(device, make(size, 41, 8, teacher=(53, 5), dtype=dtype))
    rows = torch.arange(size, device=device)
    rows[::3] = -1
    weights = torch.rand(2, size, generator=torch.Generator().manual_seed(3)).to(device)
    half = size // 2
    return (
        [a["hidden"][:half], a["hidden"][half:].clone()], a["weight"], a["teacher_hidden"],
        a["teacher_weight"], a["labels"], rows, *weights.unbind(), 2.0, IGNORED, 5, True, True,
        impl,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_op_checklist(impl):
    check_op(op.linear_distillation, lambda n: op_arguments(n, impl=impl), sizes=[13, 0, 1, 64, 67])
