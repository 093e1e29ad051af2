"""Entropy under a linear head, against float64 log-softmax of the same inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.lm_head import linear_entropy, op, split
from shared_kernels.testing import check_op

F64 = torch.float64
IMPLS = ["reference", "split", "triton"]


def make(rows, vocabulary, width=24, dtype=torch.float32, bias=False, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype)
    extra = torch.randn(vocabulary, generator=generator).to(device, dtype) if bias else None
    return hidden, weight, extra


def expected(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprobs = torch.log_softmax(z / temperature, -1)
    entropy = -torch.where(logprobs.exp() > 0, logprobs.exp() * logprobs, 0.0).sum(-1)
    return entropy, logprobs, torch.logsumexp(z / temperature, -1)


def near(found, wanted, atol):
    torch.testing.assert_close(found.double().cpu(), wanted.cpu(), rtol=0, atol=atol)


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


OPTIONS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 5.0},
    "warm": {"softcap": 20.0, "scale": 3.0, "temperature": 0.7},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_against_log_softmax(kernel_device, impl, options, bias, monkeypatch):
    monkeypatch.setattr(split, "ROWS", 5)
    monkeypatch.setattr(split, "TOKENS", 37)
    hidden, weight, extra = make(12, 83, bias=bias, device=place(impl, kernel_device))
    tokens = torch.arange(12, device=hidden.device) * 5
    watch = torch.tensor([3, 80], device=hidden.device)
    found = linear_entropy(
        hidden, weight, bias=extra, token_ids=tokens, watch_ids=watch, impl=impl, **options
    )
    entropy, logprobs, lse = expected(hidden, weight, extra, **options)
    near(found.entropy, entropy, 2e-5)
    near(found.lse, lse, 2e-5)
    near(found.logprob, logprobs[torch.arange(12), tokens.cpu()], 2e-5)
    near(found.watched, logprobs[:, watch], 2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("width", [1, 16, 40])
@pytest.mark.parametrize("vocabulary", [1, 7, 300])
def test_shapes(kernel_device, impl, rows, width, vocabulary):
    hidden, weight, _ = make(rows, vocabulary, width, device=place(impl, kernel_device))
    near(linear_entropy(hidden, weight, impl=impl).entropy, expected(hidden, weight)[0], 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 576, 896, 3584, 70])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 151936), (17, 49152), (300, 1000), (4096, 7)])
def test_shapes_on_a_gpu(cuda, dtype, width, rows, vocabulary):
    hidden, weight, bias = make(rows, vocabulary, width, dtype=dtype, bias=True, device=cuda)
    hidden *= width**-0.5
    found = linear_entropy(hidden, weight, bias=bias, impl="triton")
    entropy, _, lse = expected(hidden, weight, bias)
    near(found.entropy, entropy, 2e-5 if dtype == torch.float32 else 1e-3)
    near(found.lse, lse, 2e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_a_common_offset_changes_nothing(kernel_device, impl, offset):
    hidden, weight, _ = make(9, 200, device=place(impl, kernel_device))
    hidden, weight = (
        torch.cat([hidden, hidden[:, :1] * 0 + 1], 1),
        torch.cat([weight, weight[:, :1] * 0 + offset], 1),
    )
    # a logit near 200 is rounded to 1.5e-5, before any sum
    near(linear_entropy(hidden, weight, impl=impl).entropy, expected(hidden, weight)[0], 2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_ends(kernel_device, impl):
    device = place(impl, kernel_device)
    hidden = torch.tensor([[0.0], [1e4], [1.0]], device=device)
    weight = torch.arange(70.0, device=device)[:, None] / 70
    found = linear_entropy(hidden, weight, impl=impl).entropy
    near(found[:1], torch.tensor([70.0], dtype=F64).log(), 1e-6)
    assert found[1] == 0
    # tokens that a mask forbids
    bias = torch.full((70,), float("-inf"), device=device)
    bias[40:42] = 0.0
    found = linear_entropy(hidden[:1], weight, bias=bias, impl=impl).entropy
    near(found, torch.tensor([2.0], dtype=F64).log(), 1e-6)
    hidden[2] = float("nan")
    assert linear_entropy(hidden, weight, impl=impl).entropy.isnan().tolist() == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_any_parts_and_any_order_of_the_vocabulary(kernel_device, impl, monkeypatch):
    hidden, weight, bias = make(11, 290, bias=True, device=place(impl, kernel_device))
    whole = linear_entropy(hidden, weight, bias=bias, impl=impl).entropy.double()
    order = torch.randperm(290, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    mixed = linear_entropy(hidden, weight[order], bias=bias[order], impl=impl).entropy
    near(mixed, whole, 1e-6 * 6)
    for splits in (1, 2, 5, 9):
        monkeypatch.setattr("shared_kernels.ops.lm_head.launch._splits", lambda *_, n=splits: n)
        monkeypatch.setattr(split, "TOKENS", -(-290 // splits))
        near(linear_entropy(hidden, weight, bias=bias, impl=impl).entropy, whole, 1e-6 * 6)
    column = torch.ones_like(hidden[:, :1])
    joined = linear_entropy(
        torch.cat([hidden, column], 1), torch.cat([weight, bias[:, None]], 1), impl=impl
    )
    near(joined.entropy, whole, 1e-6 * 6)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(rows=st.integers(0, 9), vocabulary=st.integers(1, 40), width=st.integers(1, 9))
def test_odd_shapes(rows, vocabulary, width):
    hidden, weight, _ = make(rows, vocabulary, width, dtype=F64)
    wanted = expected(hidden, weight)[0]
    for impl in ("reference", "split"):
        near(linear_entropy(hidden, weight, impl=impl).entropy, wanted, 1e-12)


@pytest.mark.parametrize("impl", ["reference", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_not_rounded_again(impl, dtype):
    hidden, weight, bias = make(9, 300, 128, dtype=dtype, bias=True)
    found = linear_entropy(hidden, weight, bias=bias, impl=impl)
    near(found.entropy, expected(hidden, weight, bias)[0], 2e-5)


def test_strides(kernel_device):
    hidden, weight, _ = make(9, 50, device=kernel_device)
    plain = linear_entropy(hidden, weight, impl="triton").entropy
    for a, b in (
        (hidden.T.contiguous().T, weight),
        (hidden, weight.T.contiguous().T),
        (torch.cat([hidden, hidden], 1)[:, :24], torch.cat([weight, weight], 1)[:, 24:]),
    ):
        # on a GPU the matrix library picks its order of sums by the layout
        near(linear_entropy(a, b, impl="triton").entropy, plain.double(), 1e-5)


def test_bad_input():
    hidden, weight, _ = make(3, 8)
    with pytest.raises(ValueError, match="temperature"):
        linear_entropy(hidden, weight, temperature=0.0)
    with pytest.raises(ValueError, match="softcap"):
        linear_entropy(hidden, weight, softcap=-1.0)
    with pytest.raises(ValueError, match="token_ids"):
        linear_entropy(hidden, weight, token_ids=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight"):
        linear_entropy(hidden, weight[:, 1:])
    with pytest.raises(ValueError, match="grad"):
        linear_entropy(hidden.requires_grad_(), weight)


@pytest.mark.parametrize("impl", IMPLS)
def test_op_checklist(kernel_device, impl):
    def make_args(size):
        hidden, weight, bias = make(size, 40, bias=True, device=place(impl, kernel_device))
        return hidden, weight, bias, 0.5, 3.0, impl

    check_op(op.linear_entropy, make_args, sizes=[13, 0, 1, 64, 67])
