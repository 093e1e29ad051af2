"""Attention of many rows less the base: identities, float64, sharing, one query, and bad input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.patching.attention import op, suffix_attention
from shared_kernels.testing import check_op

F64 = torch.float64
IMPLS = ["reference", "triton"]


def make(tokens=7, width=12, wide=10, rows=(3, 3, 3), heads=4, shared=2, examples=2, at=False,
         device="cpu", dtype=torch.float32):  # fmt: skip
    generator = torch.Generator().manual_seed(tokens + 10 * width + 100 * heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    queries = 1 if at else tokens
    q = draw(heads, rows[0], examples, queries, width)
    k = draw(shared, rows[1], examples, tokens, width)
    v = draw(shared, rows[2], examples, tokens, wide)
    base = draw(heads, examples, queries, wide)
    kv = torch.arange(heads, device=device) * shared // max(1, heads)
    place = (tokens - 1 - 3 * torch.arange(examples, device=device)) % max(1, tokens)
    return q, k, v, base, kv, place if at else None


def exact(q, k, v, base, kv, at, scale, window=None, softcap=None, causal=True):
    """Query by query, in float64."""
    rows = max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v = (x.double().expand(-1, rows, -1, -1, -1) for x in (q, k[kv], v[kv]))
    out = base.double()[:, None].repeat(1, rows, 1, 1, 1).neg()
    for n, i in itertools.product(range(q.shape[2]), range(q.shape[3])):
        last = i if at is None else int(at[n])
        first = 0 if window is None else max(0, last - window + 1)
        seen = slice(first, last + 1 if causal else None)
        scores = torch.einsum("hmd,hmtd->hmt", q[:, :, n, i], k[:, :, n, seen]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[:, :, n, i] += torch.einsum("hmt,hmtd->hmd", scores.softmax(-1), v[:, :, n, seen])
    return out


def check(args, impl, **options):
    *tensors, at = args
    options.setdefault("scale", max(1, tensors[0].shape[-1]) ** -0.5)
    found = suffix_attention(*tensors, at=at, impl=impl, **options)
    dtype = options.pop("dtype", torch.float32)
    wanted = exact(*tensors, at, **options)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    size = tensors[2].abs().max().item() if tensors[2].numel() else 1.0
    bound = 1e-6 * size + 1.2e-7 * wanted.abs()
    if dtype == torch.bfloat16:
        # the interpreter truncates where the GPU rounds
        bound = bound + (2**-7 if found.device.type == "cpu" else 2**-8) * wanted.abs()
    error = (found.double() - wanted).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max().item():.3g} times the bound"


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", [False, True])
def test_the_base_differs_from_itself_by_nothing(kernel_device, impl, at):
    q, k, v, base, kv, where = make(rows=(1, 1, 1), at=at, device=place(impl, kernel_device))
    options = {"at": where, "scale": 0.3, "window": 4, "softcap": 20.0, "impl": impl}
    base = suffix_attention(q, k, v, torch.zeros_like(base), kv, **options)[:, 0]
    moved = q.repeat(1, 5, 1, 1, 1)
    moved[:, 3] += 1.0
    found = suffix_attention(moved, k, v, base, kv, **options)
    assert not found[:, [0, 1, 2, 4]].any()
    # the first token sees itself alone
    assert found[:, 3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_key_is_its_value(kernel_device, impl):
    q, k, v, base, kv, _ = make(device=place(impl, kernel_device))
    found = suffix_attention(q, k, v, torch.zeros_like(base), kv, scale=1.0, window=1, impl=impl)
    # tensor cores multiply in two parts of 11 bits
    torch.testing.assert_close(found, v[kv], rtol=2**-21, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize("rows", [(3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 1, 3), (3, 3, 3), (1, 1, 1)])
def test_rows_share(kernel_device, impl, at, rows):
    args = make(rows=rows, heads=2, shared=1, at=at, device=place(impl, kernel_device))
    check(args, impl)
    tensors = [x.expand(-1, max(rows), -1, -1, -1) for x in args[:3]]
    options = {"at": args[5], "scale": 0.3, "impl": impl}
    wide = suffix_attention(*tensors, *args[3:5], **options)
    assert torch.equal(suffix_attention(*args[:5], **options), wide)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (5, None), (None, 2.0), (40, 1.0)])
def test_windows_and_caps(kernel_device, impl, at, window, softcap):
    device = place(impl, kernel_device)
    for tokens in (5, 19, 45):
        args = make(tokens, rows=(2, 1, 1), heads=1, shared=1, at=at, device=device)
        check(args, impl, window=window, softcap=softcap)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize("rows", [(2, 1, 1), (1, 2, 2)])
def test_of_all_keys(kernel_device, impl, at, rows):
    device = place(impl, kernel_device)
    for tokens, softcap in ((1, None), (5, None), (19, 2.0), (70, None)):
        args = make(tokens, rows=rows, heads=2, shared=1, at=at, device=device)
        check(args, impl, softcap=softcap, causal=False)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_all_keys_the_order_says_nothing(kernel_device, impl):
    q, k, v, base, kv, at = make(19, rows=(1, 3, 3), at=True, device=place(impl, kernel_device))
    options = {"at": at, "scale": 0.3, "causal": False, "impl": impl}
    found = suffix_attention(q, k, v, base, kv, **options)
    turned = suffix_attention(
        q, k.flip(3).contiguous(), v.flip(3).contiguous(), base, kv, **options
    )
    torch.testing.assert_close(found, turned, atol=1e-6, rtol=0)
    seen = suffix_attention(q, k, v, base, kv, **options | {"causal": True})
    assert float((found - seen).abs().max()) > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_widths_and_tokens_beyond_a_block(kernel_device, impl):
    device = place(impl, kernel_device)
    for tokens, width, wide in (
        (16, 1, 1),
        (17, 64, 65),
        (33, 130, 16),
        (70, 16, 129),
        (9, 256, 256),
    ):
        for at in (False, True):
            args = make(tokens, width, wide, (2, 1, 1), 1, 1, 1, at, device)
            check(args, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_results_of_16_bits(kernel_device, impl):
    for at in (False, True):
        check(make(at=at, device=place(impl, kernel_device)), impl, dtype=torch.bfloat16)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(tokens=st.integers(1, 20), width=st.integers(1, 20), wide=st.integers(0, 20),
       rows=st.tuples(*[st.sampled_from([1, 3])] * 3), heads=st.integers(0, 3),
       examples=st.integers(0, 2), at=st.booleans(), impl=st.sampled_from(IMPLS))  # fmt: skip
def test_any_shape(tokens, width, wide, rows, heads, examples, at, impl):
    if torch.cuda.is_available():
        impl = "reference"
    check(make(tokens, width, wide, rows, heads, 2, examples, at), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_no_tokens(kernel_device, impl):
    device = place(impl, kernel_device)
    for args in (make(rows=(0, 1, 1), device=device), make(0, device=device)):
        found = suffix_attention(*args[:5], scale=1.0, impl=impl)
        assert found.shape == (4, max(args[0].shape[1], 0), 2, args[0].shape[3], 10)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_any_size(kernel_device, impl):
    q, k, v, base, kv, _ = make(device=place(impl, kernel_device))
    found = suffix_attention(1e4 * q, k, v, base, kv, scale=1.0, impl=impl)
    best = (q.double() @ k.double()[kv].mT).masked_fill(
        torch.ones(7, 7, dtype=torch.bool, device=q.device).triu(1), float("-inf")
    )
    wanted = v[kv].gather(3, best.argmax(-1)[..., None].expand(-1, -1, -1, -1, 10))
    torch.testing.assert_close(found, wanted - base[:, None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(kernel_device, impl):
    q, k, v, base, kv, _ = make(device=place(impl, kernel_device))
    wanted = suffix_attention(q, k, v, base, kv, scale=0.3, impl=impl)
    last = [x.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4) for x in (q, k, v)]
    found = suffix_attention(*last, base, kv, scale=0.3, impl=impl)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(suffix_attention(*turned, base, kv, scale=0.3, impl=impl), wanted)


def test_keys_that_are_not_seen_are_not_read(kernel_device):
    q, k, v, base, kv, at = make(45, rows=(3, 1, 1), at=True, device=kernel_device)
    at = torch.tensor([20, 38], device=kernel_device)
    options = {"at": at, "scale": 0.3, "window": 9, "impl": "triton"}
    wanted = suffix_attention(q, k, v, base, kv, **options)
    k, v = k.clone(), v.clone()
    for example, last in enumerate((20, 38)):
        for x in (k, v):
            x[:, :, example, last + 1 :] = float("nan")
            x[:, :, example, : last - 8] = float("nan")
    assert torch.equal(suffix_attention(q, k, v, base, kv, **options), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("at", "window", "causal"), [
    (False, 4, True), (True, 4, True), (False, None, False), (True, None, False),
])  # fmt: skip
def test_the_op_keeps_the_rules_of_the_house(kernel_device, impl, at, window, causal):
    def arguments(size):
        device = place(impl, kernel_device)
        args = make(5, rows=(size, 1, size), heads=2, shared=1, at=at, device=device)
        return *args, 0.3, window, 5.0, causal, torch.float32, impl

    check_op(op.suffix_attention, arguments, [3, 0, 1])


def test_float64_and_gradients_of_the_definition():
    args = make(dtype=F64)
    *tensors, _ = args
    found = suffix_attention(*tensors, scale=0.4, window=3, softcap=2.0, dtype=F64)
    torch.testing.assert_close(found, exact(*args, 0.4, 3, 2.0), rtol=1e-12, atol=1e-12)
    q, k, v, base, kv, _ = make(3, 2, 2, heads=2, shared=1, examples=1, dtype=F64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *qkv: op.reference.suffix_attention(*qkv, base, kv, None, 0.4, 2, 3.0, True, F64),
        inputs,
    )


def test_bad_input():
    q, k, v, base, kv, _ = args = make()
    *tensors, _ = args
    with pytest.raises(ValueError, match=r"k: expected shape \(any, any, 2, any, 12\)"):
        suffix_attention(q, k[..., 1:], v, base, kv, scale=1.0)
    with pytest.raises(ValueError, match=r"v: expected shape \(2, any, 2, 7, any\)"):
        suffix_attention(q, k, v[:, :, :, 1:], base, kv, scale=1.0)
    with pytest.raises(ValueError, match="v: expected 1 or 3 rows"):
        suffix_attention(q, k, v[:, :2], base, kv, scale=1.0)
    with pytest.raises(ValueError, match="base: expected shape"):
        suffix_attention(q, k, v, base[1:], kv, scale=1.0)
    with pytest.raises(ValueError, match="q: expected 7 queries"):
        suffix_attention(q[:, :, :, :1], k, v, base[:, :, :1].contiguous(), kv, scale=1.0)
    with pytest.raises(ValueError, match="q: expected 1 queries"):
        suffix_attention(*tensors, at=torch.zeros(2, dtype=torch.int64), scale=1.0)
    with pytest.raises(ValueError, match=r"kv: expected numbers in \[0, 2\)"):
        suffix_attention(q, k, v, base, kv + 1, scale=1.0)
    one = make(at=True)
    with pytest.raises(ValueError, match=r"at: expected numbers in \[0, 7\)"):
        suffix_attention(*one[:5], at=one[5] + 1, scale=1.0)
    with pytest.raises(TypeError, match="at: expected int64"):
        suffix_attention(*one[:5], at=one[5].int(), scale=1.0)
    with pytest.raises(ValueError, match="window: expected an integer"):
        suffix_attention(*tensors, scale=1.0, window=0)
    with pytest.raises(ValueError, match="window: expected None without causal, got int 3"):
        suffix_attention(*tensors, scale=1.0, window=3, causal=False)
    with pytest.raises(ValueError, match="softcap: expected a positive number"):
        suffix_attention(*tensors, scale=1.0, softcap=0.0)
    with pytest.raises(TypeError, match="dtype: expected float32 or bfloat16"):
        suffix_attention(*tensors, scale=1.0, dtype=torch.float16)
    with pytest.raises(TypeError, match="q: expected float32 or float64"):
        suffix_attention(q.bfloat16(), k, v, base, kv, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize(
    ("tokens", "width", "heads", "examples", "rows"),
    [(14, 64, 9, 64, 64), (15, 128, 3, 33, 17), (31, 80, 2, 20, 9), (300, 64, 3, 10, 8),
     (130, 256, 2, 3, 5), (520, 128, 2, 2, 3)],
)  # fmt: skip
def test_on_a_gpu(cuda, at, tokens, width, heads, examples, rows):
    for pattern in ((1, 0, 0), (0, 1, 1), (1, 1, 1)):
        some = tuple(rows if one else 1 for one in pattern)
        args = make(tokens, width, width, some, heads, max(1, heads // 3), examples, at, cuda)
        for options in (
            {}, {"window": 64, "softcap": 50.0}, {"dtype": torch.bfloat16}, {"causal": False},
        ):  # fmt: skip
            check(args, "triton", **options)
        *tensors, where = args
        found = suffix_attention(*tensors, at=where, scale=0.1)
        assert torch.equal(found, suffix_attention(*tensors, at=where, scale=0.1))
        # which other rows there are changes no bit
        part = [x[:, 2:3] if x.shape[1] > 1 else x for x in tensors[:3]]
        assert torch.equal(
            found[:, 2:3], suffix_attention(*part, *tensors[3:], at=where, scale=0.1)
        )


@pytest.mark.gpu
def test_in_a_graph(cuda):
    *tensors, _ = make(14, 64, 64, (8, 1, 1), device=cuda)
    suffix_attention(*tensors, scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = suffix_attention(*tensors, scale=0.1)
    tensors[0] *= 0.5
    graph.replay()
    assert torch.equal(found, suffix_attention(*tensors, scale=0.1))
