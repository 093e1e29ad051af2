"""Log-probabilities under a linear head, against log_softmax in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.lm_head import launch, linear_logprob, op, reference
from shared_kernels.testing import check_op

F64 = torch.float64


def make_head(rows, vocabulary, width=24, targets=None, dtype=torch.float32, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    count = rows if targets is None else targets
    picks = {
        "targets": torch.randint(0, vocabulary, (count,), generator=generator),
        "rows": torch.randint(0, max(1, rows), (count,), generator=generator),
    }
    if targets is None:
        picks["rows"] = None
    if bias:
        picks["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    return {"hidden": hidden, "weight": weight, **picks}


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def assert_right(arguments, impl, *, atol, scale=1.0, softcap=None, top_k=3):
    found = linear_logprob(
        **arguments, scale=scale, softcap=softcap, entropy=True, top_k=top_k, impl=impl
    )
    a = on("cpu", arguments)
    logits = a["hidden"].double() @ a["weight"].double().T
    if a.get("bias") is not None:
        logits = logits + a["bias"].double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits, -1)
    rows = torch.arange(len(logits)) if a["rows"] is None else a["rows"]
    near = {"rtol": 0, "atol": atol}
    got = on("cpu", found._asdict())
    torch.testing.assert_close(got["logprob"].double(), logprobs[rows, a["targets"]], **near)
    torch.testing.assert_close(got["lse"].double(), logits.logsumexp(-1), **near)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(got["entropy"].double(), entropy, rtol=0, atol=4 * atol)
    values = logprobs.topk(top_k).values
    torch.testing.assert_close(got["top_logprobs"].double(), values, **near)
    picked = logprobs.gather(1, got["top_indices"])
    torch.testing.assert_close(got["top_logprobs"].double(), picked, **near)
    best = logprobs.gather(1, got["argmax"][:, None])[:, 0]
    torch.testing.assert_close(best, logprobs.amax(-1), **near)


OPTIONS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 5.0},
    "both": {"scale": 3.0, "softcap": 20.0},
}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("bias", [False, True])
def test_against_log_softmax(kernel_device, impl, options, bias, monkeypatch):
    for name, value in (("ROWS", 5), ("ELEMENTS", 5 * 37), ("STEP", 37)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 300)
    device = kernel_device if impl == "triton" else "cpu"
    for targets in (None, 0, 31):
        arguments = on(device, make_head(12, 83, targets=targets, bias=bias))
        assert_right(arguments, impl, atol=1e-5, **options)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_blocks_of_the_kernel(kernel_device, impl):
    device = kernel_device if impl == "triton" else "cpu"
    for vocabulary in (1, 1023, 1024, 4097):
        arguments = on(device, make_head(3, vocabulary, targets=5))
        assert_right(arguments, impl, atol=1e-5, top_k=1)


def test_in_float64():
    assert_right(make_head(7, 50, dtype=F64, targets=9, bias=True), "reference", atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_not_rounded_again(kernel_device, impl, dtype):
    device = kernel_device if impl == "triton" else "cpu"
    arguments = on(device, make_head(9, 300, width=128, dtype=dtype, bias=True))
    assert_right(arguments, impl, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_ties_go_to_the_lowest_token(kernel_device, impl, monkeypatch):
    monkeypatch.setattr(launch, "ELEMENTS", 32)
    monkeypatch.setattr(launch, "STEP", 16)
    device = kernel_device if impl == "triton" else "cpu"
    weight = torch.zeros(40, 4, device=device)
    weight[[7, 9, 20, 39]] = 1.0
    hidden = torch.ones(2, 4, device=device)
    hidden[1] = -1
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    assert linear_logprob(hidden, weight, targets, impl=impl).argmax.tolist() == [7, 0]


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9), vocabulary=st.integers(1, 40), width=st.integers(1, 9),
    targets=st.integers(0, 20),
)  # fmt: skip
def test_odd_shapes(rows, vocabulary, width, targets):
    arguments = make_head(rows, vocabulary, width=width, targets=targets)
    assert_right(arguments, "reference", atol=1e-5, top_k=min(3, vocabulary))


def test_against_linear_cross_entropy():
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        pytest.skip("this torch has no linear_cross_entropy")
    arguments = make_head(20, 70)
    loss = function(
        arguments["hidden"], arguments["weight"], arguments["targets"], reduction="none"
    )
    torch.testing.assert_close(linear_logprob(**arguments).logprob, -loss, rtol=0, atol=1e-5)


def test_a_target_outside_the_vocabulary_has_no_number(kernel_device):
    arguments = on(kernel_device, make_head(3, 20))
    arguments["targets"][1] = 20
    logprob = linear_logprob(**arguments, impl="triton").logprob
    assert logprob.isnan().tolist() == [False, True, False]


def test_not_a_number_stays_in_its_row(kernel_device):
    for impl, device in (("reference", "cpu"), ("triton", kernel_device)):
        arguments = on(device, make_head(4, 20))
        clean = linear_logprob(**arguments, impl=impl)
        arguments["hidden"][2] = float("nan")
        found = linear_logprob(**arguments, impl=impl)
        assert found.logprob.isnan().tolist() == [False, False, True, False]
        keep = [0, 1, 3]
        torch.testing.assert_close(found.logprob[keep], clean.logprob[keep], rtol=0, atol=1e-6)


BAD = {
    "width": ({"weight": torch.zeros(5, 3)}, ValueError, "weight: expected shape"),
    "dtype": ({"weight": torch.zeros(5, 24, dtype=F64)}, TypeError, "weight: expected float32"),
    "targets": ({"targets": torch.zeros(2)}, TypeError, "targets: expected int64"),
    "count": ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, "one per row"),
    "rows": ({"rows": torch.zeros(1, dtype=torch.int64)}, ValueError, "rows: expected shape"),
    "bias": ({"bias": torch.zeros(3)}, ValueError, "bias: expected shape"),
    "empty": ({"weight": torch.zeros(0, 24)}, ValueError, "at least one token"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap: expected a positive"),
    "top_k": ({"top_k": 9}, ValueError, "top_k: expected an integer"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        linear_logprob(**(make_head(4, 8) | change))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_op_checklist(kernel_device, impl):
    device = kernel_device if impl == "triton" else "cpu"

    def make_args(size):
        a = on(device, make_head(max(size, 1), 40, targets=size, bias=True))
        rows = a["rows"] if size else a["rows"][:0]
        hidden = a["hidden"][:size]
        return hidden, a["weight"], a["targets"], rows, a["bias"], 0.5, 3.0, True, 2, impl

    check_op(op.linear_logprob, make_args, sizes=[13, 0, 1, 64, 67])
