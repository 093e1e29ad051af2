"""Divergences from differences of states: identities, float64, shifts, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.patching.kl import kl_from_delta, launch, mean_weight, op, reference
from shared_kernels.testing import check_op
from shared_kernels.testing.poison import poison_

F64 = torch.float64
IMPLS = ["reference", "triton"]


def make(rows=3, examples=5, width=24, vocabulary=150, size=1.0, dtype=torch.float32, device="cpu",
         sharp=2.0, common=0.0):  # fmt: skip
    """States whose logits differ by about ``size``, and all of them by ``common`` besides."""
    generator = torch.Generator(device).manual_seed(rows + 7 * examples + width)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    weight, delta = draw(vocabulary, width), size * draw(rows, examples, width)
    delta /= max(1, width) ** 0.5
    if common:
        along = draw(width)
        along /= along.norm()
        weight += (common - weight @ along)[:, None] * along
        delta += (1 - delta @ along)[..., None] * along
    law = (sharp * draw(examples, vocabulary)).softmax(-1)
    weight = weight.to(dtype)
    return delta, weight, law, mean_weight(weight, law)


def exact(delta, weight, law, scale=1.0):
    """KL by its definition in float64, of the law that ``law`` stands for."""
    p = law.double() / law.double().sum(-1, keepdim=True)
    z = scale * delta.double() @ weight.double().T
    t = z - (p * z).sum(-1, keepdim=True)
    small = (p * reference.excess(t)).sum(-1).log1p()
    return torch.where(t.amax(-1) < 1, small, (p.log() + t).logsumexp(-1))


def check(delta, weight, law, mean, impl, scale=1.0):
    found = kl_from_delta(delta, weight, law, mean, scale=scale, impl=impl)
    wanted = exact(delta, weight, law, scale)
    assert found.shape == delta.shape[:2]
    assert found.dtype == delta.dtype
    error = (found.double() - wanted).abs()
    bound = 1e-9 + 1e-5 * wanted
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the bound, KL up to {wanted.max().item():.3g}"
    assert bool((found >= 0).all())
    return worst


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_has_no_divergence(kernel_device, impl):
    delta, weight, law, mean = make(device=place(impl, kernel_device))
    delta[1] = 0.0
    found = kl_from_delta(delta, weight, law, mean, impl=impl)
    assert not found[1].any()
    assert bool((found[0] > 0).all())


def test_the_definition_is_the_textbook_one():
    delta, weight, law, _ = make(vocabulary=40, size=2.0)
    delta, weight, law = delta.double(), weight.double(), law.double()
    law /= law.sum(-1, keepdim=True)
    q = (law.log() + 0.7 * delta @ weight.T).log_softmax(-1)
    wanted = (law * (law.log() - q)).sum(-1)
    found = kl_from_delta(delta, weight, law, mean_weight(weight, law), scale=0.7)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_the_excess_near_zero():
    t = torch.tensor([0.0, 1e-9, -1e-3, 0.0999, 0.1001, -0.3, 2.0], dtype=F64)
    wanted = sum(t**k / torch.lgamma(torch.tensor(k + 1.0, dtype=F64)).exp() for k in range(2, 30))
    torch.testing.assert_close(reference.excess(t), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 0.5, 3.0, 10.0, 30.0])
def test_against_float64(kernel_device, impl, size):
    check(*make(size=size, device=place(impl, kernel_device)), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("common", [10.0, 20.0])
@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_what_all_logits_do_does_not_count(kernel_device, impl, common, size):
    check(*make(size=size, common=common, device=place(impl, kernel_device)), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_scales(kernel_device, impl, dtype):
    device = place(impl, kernel_device)
    for shape in ((1, 1, 1, 1), (17, 1, 33, 129), (2, 9, 16, 128), (1, 16, 5, 300)):
        check(*make(*shape, dtype=dtype, device=device), impl, scale=0.3)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(0, 6), examples=st.integers(0, 6), width=st.integers(0, 40),
       vocabulary=st.integers(1, 140), impl=st.sampled_from(IMPLS))  # fmt: skip
def test_any_shape(rows, examples, width, vocabulary, impl):
    if torch.cuda.is_available():
        impl = "reference"
    check(*make(rows, examples, width, vocabulary), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_any_size(kernel_device, impl):
    """A token that was nearly impossible and then is all there is, and states of any scale."""
    delta, weight, law, mean = make(vocabulary=40, device=place(impl, kernel_device))
    delta[:], weight[:, 0], weight[7, 0], weight[8, 0] = 0.0, 0.0, 1.0, 0.05
    delta[..., 0] = torch.tensor([59.0, 90.0, 5000.0])[:, None]
    law[:, 7] = torch.tensor([1e-3, 1e-30, 1e-42, 0.0, 1.0])
    law[4, :7] = law[4, 8:] = 0.0
    mean = mean_weight(weight, law)
    found = kl_from_delta(delta, weight, law, mean, impl=impl)
    assert bool(found.isfinite().all())
    # the law as it is, though its probabilities do not sum to one
    p = law.double()
    t = (delta.double()[..., None, :] * (weight - mean[:, None]).double()).sum(-1)
    near = (p * reference.excess(t.clamp(max=60.0))).sum(-1).log1p()
    high = (p.log() + t).masked_fill(t <= 60, float("-inf")).logsumexp(-1)
    wanted = torch.logaddexp(near, high)
    lesser = wanted < 50
    # float32 rounds a logit of 5000 by 2^-12, and half its square is a divergence
    torch.testing.assert_close(found[lesser], wanted[lesser].float(), rtol=2e-5, atol=2**-24)
    torch.testing.assert_close(found[~lesser], wanted[~lesser].float(), rtol=2e-5, atol=1e-4)
    for factor in (1e-30, 1e25):
        delta, weight, law, mean = make(device=place(impl, kernel_device))
        check(delta * factor, weight / factor, law, mean / factor, impl)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("impl", IMPLS)
def test_not_a_number_stays_in_its_row(kernel_device, impl):
    delta, weight, law, mean = make(device=place(impl, kernel_device))
    delta[1, 2, 3] = float("nan")
    found = kl_from_delta(delta, weight, law, mean, impl=impl).isnan()
    assert found.nonzero().tolist() == [[1, 2]]


def test_chunks_of_the_head_change_nothing(kernel_device, monkeypatch):
    args = make(4, 3, vocabulary=1300, device=kernel_device)
    whole = kl_from_delta(*args, impl="triton")
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1)
    assert torch.equal(kl_from_delta(*args, impl="triton"), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_what_lies_between(kernel_device, impl):
    delta, weight, law, mean = make(device=place(impl, kernel_device))
    wanted = kl_from_delta(delta, weight, law, mean, impl=impl)
    room = poison_(delta.new_empty(3, 5, 2, 30))
    room[:, :, 1, :24] = delta
    assert torch.equal(kl_from_delta(room[:, :, 1, :24], weight, law, mean, impl=impl), wanted)
    turned = delta.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(kl_from_delta(turned, weight, law, mean, impl=impl), wanted)
    same = delta[:1].expand(3, -1, -1)
    assert torch.equal(kl_from_delta(same, weight, law, mean, impl=impl), wanted[:1].expand(3, -1))


def test_mean_weight():
    _, weight, law, mean = make(vocabulary=9000)
    wanted = (law.double() @ weight.double() / law.double().sum(1, keepdim=True)).float()
    torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=1e-9)
    assert mean_weight(weight.bfloat16(), law).dtype == torch.float32
    assert mean_weight(weight, law.double()).dtype == F64


def test_gradients_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    law, weight = draw(2, 7).softmax(-1), draw(7, 3)
    mean = mean_weight(weight, law)
    delta = draw(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reference.kl_from_delta(x, weight, law, mean, 0.5), delta
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_the_op_keeps_the_rules_of_the_house(kernel_device, impl):
    def arguments(rows):
        return *make(rows, 3, 20, 140, device=place(impl, kernel_device)), 0.5, impl

    check_op(op.kl_from_delta, arguments, [3, 0, 1, 6])


def test_bad_input():
    delta, weight, law, mean = make()
    with pytest.raises(ValueError, match=r"weight: expected shape \(any, 24\)"):
        kl_from_delta(delta, weight[:, :23].contiguous(), law, mean)
    with pytest.raises(ValueError, match=r"law: expected shape \(5, 150\)"):
        kl_from_delta(delta, weight, law[:, 1:].contiguous(), mean)
    with pytest.raises(ValueError, match=r"mean: expected shape \(5, 24\)"):
        kl_from_delta(delta, weight, law, mean[1:])
    with pytest.raises(TypeError, match="weight: expected float32 or bfloat16"):
        kl_from_delta(delta, weight.double(), law, mean)
    with pytest.raises(TypeError, match="delta: expected float32 or float64"):
        kl_from_delta(delta.bfloat16(), weight, law, mean)
    with pytest.raises(ValueError, match="outside autograd"):
        kl_from_delta(delta.requires_grad_(), weight, law, mean)
    with pytest.raises(ValueError, match=r"law: expected shape \(any, 150\)"):
        mean_weight(weight, law.T.contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "examples", "width", "vocabulary"),
    [(64, 64, 576, 49152), (37, 50, 768, 50257), (3, 16, 4096, 128256), (1, 1, 2304, 256000)],
)
def test_on_a_gpu(cuda, dtype, rows, examples, width, vocabulary):
    for size, common, sharp in (
        (1e-5, 0.0, 3.0), (1e-2, 20.0, 3.0), (0.3, 0.0, 6.0), (3.0, 10.0, 1.0), (30.0, 0.0, 3.0),
    ):  # fmt: skip
        delta, weight, law, mean = make(
            rows, examples, width, vocabulary, size, dtype, cuda, sharp, common
        )
        found = kl_from_delta(delta, weight, law, mean)
        for m in {0, rows // 2, rows - 1}:
            wanted = exact(delta[m], weight, law)
            error = (found[m].double() - wanted).abs()
            assert bool((error <= 1e-9 + 1e-5 * wanted).all()), (size, common, error / wanted)
        assert torch.equal(found, kl_from_delta(delta, weight, law, mean))
        # what the other rows are, and how many, changes no bit
        for some in (slice(rows - 1, rows), slice(rows // 3, rows)):
            assert torch.equal(found[some], kl_from_delta(delta[some], weight, law, mean))
        assert bool((found >= 0).all())


@pytest.mark.gpu
def test_in_a_graph(cuda):
    delta, weight, law, mean = make(8, 8, 64, 5000, device=cuda)
    kl_from_delta(delta, weight, law, mean)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kl_from_delta(delta, weight, law, mean)
    delta *= 0.5
    graph.replay()
    assert torch.equal(found, kl_from_delta(delta, weight, law, mean))
