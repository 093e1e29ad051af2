"""The row kernels of distillation against their definitions, and the whole on a GPU."""

import pytest
import torch
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.distill import (
    chunks,
    fused_linear_distillation,
    fused_linear_distillation_heads,
    launch,
    op,
    reference,
    sparse_distillation,
)
from shared_kernels.testing import check_op
from shared_kernels.testing.poison import poisoned_empty
from torch.nn.functional import cross_entropy, kl_div, log_softmax

IGNORED = -100


def logits(rows, vocabulary, device, teachers=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(rows, vocabulary, generator=generator)
    teacher = 3 * torch.randn(teachers or rows, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1::3] = IGNORED
    place = torch.randint(0, len(teacher), (rows,), generator=generator)
    weights = torch.rand(2, rows, generator=generator)
    weights[0, 1::3] = 0
    given = (student, teacher, place, labels, *weights)
    return [x.to(device) for x in given]


def run_rows(student, teacher, place, labels, lm, kd, temperature, slope_dtype=None):
    stats = student.new_empty(len(student), 4)
    slope = None
    if slope_dtype is not None:
        own = slope_dtype == student.dtype
        slope = student if own else torch.empty_like(student, dtype=slope_dtype)
    launch.distillation_rows(
        student, slope, teacher, place, labels, lm, kd, temperature, IGNORED, stats
    )
    return stats, slope


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 331])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_against_the_definition(kernel_device, vocabulary, temperature):
    student, teacher, place, labels, lm, kd = logits(5, vocabulary, kernel_device, teachers=3)
    wide, wide_teacher = student.double(), teacher.double()[place]
    expected = reference.row_terms(wide, wide_teacher, labels, temperature, IGNORED)
    slope = reference.logits_gradient(
        wide, wide_teacher, labels, lm.double(), kd.double(), temperature, IGNORED
    )
    kept = teacher.clone()
    with poisoned_empty():
        stats, found = run_rows(student, teacher, place, labels, lm, kd, temperature, torch.float32)
    torch.testing.assert_close(stats.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.double(), slope, rtol=1e-5, atol=1e-7)
    assert torch.equal(teacher, kept)


def test_rows_of_a_wider_buffer(kernel_device):
    student, teacher, place, labels, lm, kd = logits(4, 200, kernel_device)
    expected = reference.row_terms(student, teacher[place], labels, 1.0, IGNORED)
    wide = torch.full((2, 4, 230), 50.0, device=kernel_device)
    wide[0, :, :200], wide[1, :, :200] = student, teacher
    own, others = wide[0, :, :200], wide[1, :, :200]
    stats, _ = run_rows(own, others, place, labels, lm, kd, 1.0, torch.float32)
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-5)
    assert (wide[:, :, 200:] == 50).all()


def test_equal_logits_have_no_divergence_and_no_gradient(kernel_device):
    for temperature in (1.0, 2.0):
        student, *_ = logits(4, 300, kernel_device)
        ones, rows = torch.ones(4, device=kernel_device), torch.arange(4, device=kernel_device)
        labels = torch.full((4,), IGNORED, device=kernel_device)
        stats, slope = run_rows(
            student, student.clone(), rows, labels, 0 * ones, ones, temperature, torch.float32
        )
        assert (stats[:, 1] == 0).all()
        assert (stats[:, 3] == 1).all()
        assert (slope == 0).all()


def test_a_common_offset_of_large_logits_is_lost_to_nothing(kernel_device):
    student, teacher, place, labels, lm, kd = logits(4, 300, kernel_device)
    expected = reference.row_terms(student.double(), teacher.double()[place], labels, 1.0, IGNORED)
    # powers of two, so that little of the logits is rounded away
    stats, _ = run_rows(student + 64, teacher - 128, place, labels, lm, kd, 1.0)
    torch.testing.assert_close(stats.double(), expected, rtol=1e-4, atol=1e-4)


def test_narrow_slopes(kernel_device):
    student, teacher, place, labels, lm, kd = logits(4, 300, kernel_device)
    slope = reference.logits_gradient(student, teacher[place], labels, lm, kd, 2.0, IGNORED)
    for dtype in (torch.bfloat16, torch.float16):
        _, found = run_rows(student.clone(), teacher, place, labels, lm, kd, 2.0, dtype)
        # the interpreter truncates to bfloat16
        bound = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), slope, rtol=bound, atol=1e-6)


def test_not_a_number_stays_in_its_row(kernel_device):
    student, teacher, _, labels, lm, kd = logits(4, 140, kernel_device)
    student[1, 70] = float("nan")
    teacher[2, 3] = float("nan")
    rows = torch.arange(4, device=kernel_device)
    stats, slope = run_rows(student, teacher, rows, labels, lm, kd, 1.0, torch.float32)
    assert stats[:, 1].isnan().tolist() == [False, True, True, False]
    assert slope.isnan().any(-1).tolist() == [False, True, True, False]


def head(rows, vocabulary, device, *, teacher=(0, 7), width=9, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher_vocabulary, teacher_width = teacher
    total = teacher_vocabulary or vocabulary
    labels = torch.randint(0, min(vocabulary, total), (rows,), generator=generator)
    labels[::4] = IGNORED
    shapes = ((rows, width), (vocabulary, width), (rows, teacher_width), (total, teacher_width))
    tensors = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    return (*tensors, labels.to(device))


def run(impl, arguments, **options):
    hidden, weight, *rest = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    found = fused_linear_distillation(*leaves, *rest, **options, impl=impl)
    return found, torch.autograd.grad(found.loss, leaves)


@pytest.mark.parametrize("teacher", [(0, 7), (160, 7), (70, 7)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_whole_against_the_definition(kernel_device, teacher, temperature):
    arguments = head(11, 130, kernel_device, teacher=teacher)
    options = {"kd_weight": 0.6, "temperature": temperature, "chunk_size": 4}
    expected, gradients = run("reference", [x.double() if x.is_floating_point() else x
                                            for x in arguments], **options)  # fmt: skip
    found, own = run("triton", arguments, **options)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=3e-6, atol=3e-6)
    for got, wanted in zip(own, gradients, strict=True):
        assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_heads_against_the_definition(kernel_device):
    hidden, weight, teacher_hidden, teacher_weight, labels = head(12, 130, kernel_device)
    rows = torch.arange(12, device=kernel_device)
    shifted = torch.where(rows < 11, rows + 1, -1)
    results = []
    for impl in ("reference", "triton"):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, hidden.flip(0), weight)]
        found = fused_linear_distillation_heads(
            leaves[:2], leaves[2], teacher_hidden, teacher_weight, [labels, labels],
            rows=[rows, shifted], kd_weight=0.5, head_weights=[1.0, 0.3], chunk_size=5, impl=impl,
        )  # fmt: skip
        results.append((found.loss.detach(), *torch.autograd.grad(found.loss, leaves)))
    for got, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_statistics_alone(kernel_device):
    arguments = head(9, 130, kernel_device)
    found = fused_linear_distillation(*arguments, kd_weight=0.5, impl="triton")
    expected = fused_linear_distillation(*arguments, kd_weight=0.5, impl="reference")
    for got, wanted in zip(found, expected, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_float64_has_no_kernel():
    arguments = [x.double() if x.is_floating_point() else x for x in head(3, 5, "cpu")]
    with pytest.raises(KernelUnavailableError, match="float64 has no kernel"):
        fused_linear_distillation(*arguments, kd_weight=0.5, impl="triton")


def test_op_checklist(kernel_device):
    def make_args(size):
        *tensors, labels = head(size, 41, kernel_device, teacher=(53, 5))
        rows = torch.arange(size, device=kernel_device)
        rows[::3] = -1
        weights = torch.rand(2, size, generator=torch.Generator().manual_seed(3))
        lm, kd = weights.to(kernel_device).unbind()
        options = (2.0, IGNORED, 5, True, True, "triton")
        return [tensors[0]], *tensors[1:], labels, rows, lm, kd, *options

    check_op(op.linear_distillation, make_args, sizes=[13, 0, 1, 17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_rounded_once(kernel_device, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def make_args(size):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, 1237, generator=generator, dtype=wide).to(kernel_device)
        return x, torch.tensor(0.3, dtype=wide, device=kernel_device), dtype, "triton"

    x, scale, *_ = make_args(7)
    with poisoned_empty():
        found = op.scaled(x.T, scale, dtype, "triton")
    # the interpreter cuts bfloat16 off
    near = 2**-7 if dtype == torch.bfloat16 and kernel_device != "cuda" else 0.0
    torch.testing.assert_close(found, (x.T * scale).to(dtype), rtol=near, atol=0.0)
    check_op(op.scaled, make_args, sizes=[3, 0, 1, 7])


# --- a sparse teacher ---------------------------------------------------------------------------


def sparse(rows, vocabulary, known, device, tail=True, seed=0):
    """Logits, and a few tokens of a teacher with entries that are none."""
    # rows at least 1, of which a size of 0 takes none
    given = logits(max(1, rows), vocabulary, "cpu", seed=seed)
    student, teacher, _, labels, lm, kd = (x[:rows] for x in given)
    log_probs, indices = log_softmax(teacher, -1).topk(known)
    indices[:, ::5] = torch.where(torch.arange(rows)[:, None] % 2 == 1, -1, indices[:, ::5])
    given = (student, indices.int(), log_probs, labels, lm, kd)
    return [x.contiguous().to(device) for x in given]


@pytest.mark.parametrize(
    ("vocabulary", "known"), [(1, 1), (40, 40), (128, 3), (129, 16), (300, 17), (300, 299)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", [True, False])
def test_sparse_rows_against_the_definition(kernel_device, vocabulary, known, temperature, tail):
    student, *given, lm, kd = sparse(4, vocabulary, known, kernel_device)
    options = (temperature, IGNORED, tail)
    wide = student.double()
    expected = reference.sparse_row_terms(wide, *given, *options)
    slope = reference.sparse_logits_gradient(wide, *given, lm.double(), kd.double(), *options)
    stats, found = student.new_empty(4, 4), student
    with poisoned_empty():
        launch.sparse_rows(student.clone(), None, *given, lm, kd, *options, stats)
        torch.testing.assert_close(stats.double(), expected, rtol=1e-5, atol=3e-6)
        launch.sparse_rows(student, found, *given, lm, kd, *options, stats.fill_(9.0))
    torch.testing.assert_close(stats.double(), expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(found.double(), slope, rtol=2e-5, atol=1e-6)


def test_sparse_distillation_against_the_definition(kernel_device):
    hidden, weight, *_, labels = head(11, 130, kernel_device)
    indices, log_probs = sparse(11, 130, 9, kernel_device)[1:3]
    for known in ({"log_probs": log_probs}, {"log_probs": None, "weights": log_probs.exp()}):
        results = []
        for impl in ("reference", "triton"):
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
            found = sparse_distillation(
                *leaves, indices, labels=labels, **known, kd_weight=0.6, chunk_size=4, impl=impl
            )
            results.append((found.loss.detach(), *torch.autograd.grad(found.loss, leaves)))
        for got, wanted in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_inputs_need_not_be_contiguous(kernel_device):
    *tensors, labels = head(11, 130, kernel_device)
    hidden, weight, *teacher = (x.T.contiguous().T for x in tensors)
    strided = labels.repeat_interleave(3)[::3]
    indices, log_probs = sparse(11, 130, 9, kernel_device)[1:3]
    # of all rows, which are then not gathered
    options = {"kd_weight": 0.5, "distill_ignored": True, "impl": "triton"}
    found = fused_linear_distillation(hidden, weight, *teacher, strided, **options)
    expected = fused_linear_distillation(*tensors, labels, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    found = sparse_distillation(hidden, weight, indices, log_probs, strided, **options)
    expected = sparse_distillation(*tensors[:2], indices, log_probs, labels, **options)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_program_holds_so_many_tokens():
    hidden, weight, *_, labels = head(2, 1100, "cpu")
    indices = torch.arange(1025).repeat(2, 1)
    with pytest.raises(KernelUnavailableError, match="at most 1024 tokens of a row, got 1025"):
        sparse_distillation(
            hidden, weight, indices, torch.zeros(2, 1025), labels, kd_weight=0.5, impl="triton"
        )


@pytest.mark.parametrize("tail", [True, False])
def test_sparse_op_checklist(kernel_device, tail):
    def make_args(size):
        hidden, weight, *_, labels = head(size, 41, kernel_device)
        indices, log_probs, *_ = sparse(size, 41, 5, kernel_device)[1:]
        active = torch.arange(size, device=kernel_device) % 3 != 1
        weights = torch.rand(2, size, generator=torch.Generator().manual_seed(3))
        options = (2.0, IGNORED, tail, 4, True, True, "triton")
        lm, kd = weights.to(kernel_device).unbind()
        return hidden, weight, indices, log_probs, labels, active, lm, kd, *options

    check_op(op.sparse_distillation, make_args, sizes=[13, 0, 1, 17])


# --- on a GPU -----------------------------------------------------------------------------------

WIDE = 151936


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def eager(hidden, weight, teacher_hidden, teacher_weight, labels, kd_weight):
    """Plain autograd, chunk-free, of the dtype it is given."""
    s, t = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    lm = cross_entropy(s, labels, ignore_index=IGNORED)
    rows = labels != IGNORED
    kl = kl_div(
        log_softmax(s[rows], -1), log_softmax(t[rows], -1), log_target=True, reduction="batchmean"
    )
    return (1 - kd_weight) * lm + kd_weight * kl


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [2.4, 0.5, 0.16, 0.05])
def test_bfloat16_at_a_vocabulary_of_152k(cuda, noise):
    generator = torch.Generator(cuda).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=cuda)

    hidden, weight = draw(300, 256), draw(WIDE, 256) * 2 / 16
    near = hidden + noise * draw(300, 256)
    labels = torch.randint(0, WIDE, (300,), generator=generator, device=cuda)
    arguments = (hidden.bfloat16(), weight.bfloat16(), near.bfloat16(), weight.bfloat16(), labels)
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    leaves = [x.requires_grad_() for x in wide[:2]]
    wanted = torch.autograd.grad(eager(*leaves, *wide[2:], kd_weight=1.0), leaves)
    found, gradients = run("triton", arguments, kd_weight=1.0, chunk_size=128)
    for got, value in zip(gradients, wanted, strict=True):
        assert relative(got, value) <= 3e-3
    again, repeated = run("triton", arguments, kd_weight=1.0, chunk_size=128)
    assert torch.equal(found.loss, again.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True))


@pytest.mark.gpu
def test_a_student_like_its_teacher_learns_nothing_on_a_gpu(cuda):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, _, labels = head(64, WIDE, cuda, width=64, dtype=dtype)
        found, gradients = run("triton", (hidden, weight, hidden, weight, labels), kd_weight=1.0)
        assert found.kl.item() == 0.0
        assert all((g == 0).all() for g in gradients)


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_rows(cuda):
    rows, width = 16384, 256
    arguments = head(rows, WIDE, cuda, width=width, teacher=(0, 256), dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in arguments[:2]]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_linear_distillation(*leaves, *arguments[2:], kd_weight=0.5).loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # the budget, the gradients in float32 and once in bfloat16, and what a chunk takes on top
    gradients = (WIDE + rows) * width * 6
    assert peak <= chunks.BUDGET["cuda"] + gradients + (256 << 20)
    assert peak < rows * WIDE * 4
