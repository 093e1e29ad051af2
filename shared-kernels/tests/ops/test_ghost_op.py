"""The ghost ops under the checklist, compiled, in each configuration, and with bad arguments."""

import pytest
import torch
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops import ghost
from shared_kernels.ops.dp import wide
from shared_kernels.ops.ghost import launch, op
from shared_kernels.testing import assert_same_bits, check_op


def draw(*shape, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def op_arguments(tokens, impl, device="cpu"):
    x, d = draw(3, tokens, 6, device=device), draw(3, tokens, 5, device=device)
    x2, d2 = draw(2, 4, 6, device=device), draw(2, 4, 5, device=device)
    y, u, v = (draw(2, *n, device=device) for n in ((5, 6), (5, 3), (6, 3)))
    a, s = draw(6, 6, device=device), draw(5, 5, device=device)
    mask, weights = draw(3, tokens, device=device) > 0, draw(3, tokens, device=device)
    return {
        "dot": (op.ghost_dot, (x, d, y, mask, impl)),
        "dot of all": (op.ghost_dot, (x, d, y, None, impl)),
        "low rank": (op.ghost_dot_low_rank, (x, d, u, v, mask, impl)),
        "gram": (op.pairwise_ghost, (x, d, x2, d2, mask, None, "gram", impl)),
        "product": (op.pairwise_ghost, (x, d, x2, d2, mask, None, "product", impl)),
        "auto": (op.pairwise_ghost, (x, d, x2, d2, None, None, "auto", impl)),
        "cov": (op.kron_cov_, (x, d, a, s, None, None, impl)),
        "weighted cov": (op.kron_cov_, (x, d, a, s, mask, weights, impl)),
        "sketch": (op.kron_sketch, (x, d, -7, 4, 3, mask, impl)),
    }


@pytest.mark.parametrize("name", op_arguments(1, "auto"))
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_op_checklist(kernel_device, impl, name):
    device = kernel_device if impl == "triton" else "cpu"
    checked, _ = op_arguments(1, impl)[name]
    check_op(checked, lambda size: op_arguments(size, impl, device)[name][1], [13, 0, 1, 64, 67])


def test_public_functions_compile_into_one_graph():
    def step(x, d, y, a, s):
        ghost.kron_cov_(a, s, x, d)
        pairs = ghost.pairwise_ghost(x, d, x, d)
        low = ghost.ghost_dot_low_rank(x, d, y[:, :2], y.mT[:, :2])
        return ghost.ghost_dot(x, d, y), pairs, low, ghost.kron_sketch(x, d, 1 << 63, 2, 3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for b, t in ((3, 4), (5, 6)):
        args = draw(b, t, 7), draw(b, t, 8), draw(8, 7)
        eager, graph = ([torch.zeros(7, 7), torch.zeros(8, 8)] for _ in range(2))
        expected = step(*args, *eager)
        for found, wanted in zip(compiled(*args, *graph), expected, strict=True):
            assert_same_bits(found, wanted)
        for found, wanted in zip(graph, eager, strict=True):
            assert_same_bits(found, wanted)


def everything(x, d, y, u, v, mask, weights):
    device = x.device
    a, s = torch.ones(x.shape[2], x.shape[2]), torch.ones(d.shape[2], d.shape[2])
    a, s = a.to(device), s.to(device)
    launch.kron_cov_(x, d, a, s, mask, weights)
    return [
        launch.ghost_dot(x, d, y, mask),
        launch.ghost_dot_low_rank(x, d, u, v, mask),
        launch.pairwise_ghost(x, d, x[:1], d[:1], mask, None, "gram"),
        launch.pairwise_ghost(x, d, x[:1], d[:1], mask, None, "product"),
        launch.kron_sketch(x, d, 5, 66, 3, mask),
        a,
        s,
    ]


@pytest.fixture
def inputs(kernel_device):
    b, t, i, o = 2, 75, 70, 67
    shapes = ((b, t, i), (b, t, o), (3, o, i), (3, o, 70), (3, i, 70))
    tensors = [draw(*shape, device=kernel_device) for shape in shapes]
    weights = draw(b, t, device=kernel_device)
    return *tensors, weights > 0, weights


def assert_all_near(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_every_configuration_gives_the_same(inputs, monkeypatch, number):
    expected = everything(*inputs)
    used = []

    def choose(name, kind, configs, run):
        used.append(name)
        return configs[min(number, len(configs) - 1)]

    monkeypatch.setattr(launch, "choose", choose)
    assert_all_near(everything(*inputs), expected)
    assert set(used) == {
        "ghost_dot", "ghost_dot_low_rank", "pairwise_ghost", "kron_cov_", "kron_sketch",
    }  # fmt: skip
    if inputs[0].device.type == "cpu":
        # the interpreter takes what 16-bit operands are given
        for name in ("DOT", "LOW_RANK", "GRAM", "COV", "PROJECT"):
            configs = getattr(launch, f"{name}_CONFIGS")
            monkeypatch.setitem(configs, 4, configs[2])
        assert_all_near(everything(*inputs), expected)


@pytest.mark.parametrize("programs", [1, 10_000])
def test_parts_are_put_together(inputs, monkeypatch, programs):
    expected = everything(*inputs)
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    monkeypatch.setattr(launch, "_SPLIT_ROWS", 40)
    monkeypatch.setattr(launch, "_SPLIT_COLUMNS", 64)
    monkeypatch.setattr(launch, "_PARTS", 200)
    monkeypatch.setattr(launch, "_PRODUCT_CHUNK", 100)
    assert_all_near(everything(*inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_agree_with_the_reference_at_size(cuda, dtype):
    x, d = draw(8, 300, 576, device=cuda, dtype=dtype), draw(8, 300, 1536, device=cuda, dtype=dtype)
    y = draw(3, 1536, 576, device=cuda, dtype=dtype)
    u, v = (draw(3, n, 20, device=cuda, dtype=dtype) for n in (1536, 576))
    weights = draw(8, 300, device=cuda)
    a, s = torch.zeros(576, 576, device=cuda), torch.zeros(1536, 1536, device=cuda)
    ghost.kron_cov_(a, s, x, d, mask=weights > 0, weights=weights)
    found = [
        ghost.ghost_dot(x, d, y),
        ghost.ghost_dot_low_rank(x, d, u, v),
        ghost.pairwise_ghost(x, d, x, d, way="gram"),
        ghost.pairwise_ghost(x, d, x, d, way="product"),
        ghost.kron_sketch(x, d, 3, 70, 64),
        a,
        s,
    ]
    x, d, y, u, v, weights = (m.double() for m in (x, d, y, u, v, weights))
    a, s = torch.zeros_like(a, dtype=x.dtype), torch.zeros_like(s, dtype=x.dtype)
    ghost.kron_cov_(a, s, x, d, mask=weights > 0, weights=weights, impl="reference")
    pairs = ghost.pairwise_ghost(x, d, x, d, impl="reference")
    exact = [
        ghost.ghost_dot(x, d, y, impl="reference"),
        ghost.ghost_dot_low_rank(x, d, u, v, impl="reference"),
        pairs,
        pairs,
        ghost.kron_sketch(x, d, 3, 70, 64, impl="reference"),
        a,
        s,
    ]
    for one, two in zip(found, exact, strict=True):
        assert float((one - two).norm() / two.norm()) < 2e-5


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(cuda):
    # the last samples lie behind 2^31 elements
    x = torch.zeros(3, (1 << 30) // 64, 64, device=cuda, dtype=torch.bfloat16)
    x[2, -5:] = 1
    d = torch.ones(3, x.shape[1], 16, device=cuda, dtype=torch.bfloat16)
    y = torch.ones(16, 64, device=cuda, dtype=torch.bfloat16)
    wanted = [0.0, 0.0, 5.0 * 16 * 64]
    assert ghost.ghost_dot(x, d, y).tolist() == wanted
    low = ghost.ghost_dot_low_rank(x, d, y[:, :1].contiguous(), y.T[:, :1].contiguous())
    assert low.tolist() == wanted
    a, s = torch.zeros(64, 64, device=cuda), torch.zeros(16, 16, device=cuda)
    ghost.kron_cov_(a, s, x, d)
    assert bool((a == 5).all())
    torch.testing.assert_close(s, torch.full_like(s, 3 * x.shape[1]))
    pairs = ghost.pairwise_ghost(x, d, x[2:, -8:], d[2:, -8:], way="gram")
    assert pairs.flatten().tolist() == [0.0, 0.0, 25.0 * 64 * 16]
    del pairs
    z = ghost.kron_sketch(x, d, 1, 2, 2)
    assert z[:2].eq(0).all() and z[2].ne(0).any()


def bad(call):
    x, d, y = draw(2, 3, 5), draw(2, 3, 4), draw(4, 5)
    a, s = torch.zeros(5, 5), torch.zeros(4, 4)
    return lambda: call(x, d, y, a, s)


BAD = {
    "x dtype": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x.int(), d, y)),
        TypeError,
        r"x: expected float32 or bfloat16 or float16 or float64, got int32 \(2, 3, 5\)",
    ),
    "x shape": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x[0], d, y)),
        ValueError,
        r"x: expected shape \(any, any, any\), got float32 \(3, 5\).*reshape it",
    ),
    "d dtype": (
        bad(lambda x, d, y, *_: ghost.kron_sketch(x, d.half(), 0, 1, 1)),
        TypeError,
        "d: expected float32, got float16.*convert it",
    ),
    "d tokens": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d[:, 1:], y)),
        ValueError,
        r"d: expected shape \(2, 3, any\), got float32 \(2, 2, 4\)",
    ),
    "autograd": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x.requires_grad_(), d, y)),
        ValueError,
        "x: expected a tensor outside autograd.*detach",
    ),
    "autograd of a query": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y.requires_grad_())),
        ValueError,
        "y: expected a tensor outside autograd.*detach",
    ),
    "mask dtype": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y, mask=torch.ones(2, 3))),
        TypeError,
        r"mask: expected bool, got float32 \(2, 3\)",
    ),
    "mask shape": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y, mask=torch.ones(3, 2) > 0)),
        ValueError,
        r"mask: expected shape \(2, 3\), got bool \(3, 2\)",
    ),
    "y turned": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y.T)),
        ValueError,
        r"y: expected shape \(4, 5\), got float32 \(5, 4\)",
    ),
    "many y": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y.T[None])),
        ValueError,
        r"y: expected shape \(any, 4, 5\)",
    ),
    "y type": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y.tolist())),
        TypeError,
        "y: expected a float32 tensor, got list",
    ),
    "u": (
        bad(lambda x, d, y, *_: ghost.ghost_dot_low_rank(x, d, y.T, y.T)),
        ValueError,
        r"u: expected shape \(4, any\), got float32 \(5, 4\)",
    ),
    "rank": (
        bad(lambda x, d, y, *_: ghost.ghost_dot_low_rank(x, d, y[:, :2], y.T)),
        ValueError,
        r"v: expected shape \(5, 2\), got float32 \(5, 4\)",
    ),
    "one of many": (
        bad(lambda x, d, y, *_: ghost.ghost_dot_low_rank(x, d, y[None, :, :2], y.T[:, :2])),
        ValueError,
        r"v: expected shape \(1, 5, 2\)",
    ),
    "second inputs": (
        bad(lambda x, d, y, *_: ghost.pairwise_ghost(x, d, x[..., 1:], d)),
        ValueError,
        r"x2: expected shape \(any, any, 5\), got float32 \(2, 3, 4\)",
    ),
    "second gradients": (
        bad(lambda x, d, y, *_: ghost.pairwise_ghost(x, d, x, d[:1])),
        ValueError,
        r"d2: expected shape \(2, 3, 4\), got float32 \(1, 3, 4\)",
    ),
    "second mask": (
        bad(lambda x, d, y, *_: ghost.pairwise_ghost(x, d, x, d, mask2=torch.ones(2) > 0)),
        ValueError,
        r"mask2: expected shape \(2, 3\)",
    ),
    "way": (
        bad(lambda x, d, y, *_: ghost.pairwise_ghost(x, d, x, d, way="tokens")),
        ValueError,
        "way: expected one of auto, gram, product, got str 'tokens'",
    ),
    "a shape": (
        bad(lambda x, d, y, a, s: ghost.kron_cov_(s, a, x, d)),
        ValueError,
        r"a: expected shape \(5, 5\), got float32 \(4, 4\)",
    ),
    "s dtype": (
        bad(lambda x, d, y, a, s: ghost.kron_cov_(a, s.half(), x, d)),
        TypeError,
        "s: expected float32, got float16",
    ),
    "a of 16 bits": (
        bad(lambda x, d, y, a, s: ghost.kron_cov_(a.half(), s.half(), x.half(), d.half())),
        TypeError,
        "a: expected float32, got float16",
    ),
    "a expanded": (
        bad(lambda x, d, y, a, s: ghost.kron_cov_(a[:1].expand(5, 5), s, x, d)),
        ValueError,
        r"a: expected no expanded dimension, got .*strides \(0, 1\)",
    ),
    "a twice": (
        bad(lambda x, d, y, a, s: ghost.kron_cov_(a, a, x, x)),
        ValueError,
        "s: expected other memory than a",
    ),
    "weights dtype": (
        bad(lambda x, d, y, a, s: ghost.kron_cov_(a, s, x, d, weights=torch.ones(2, 3) > 0)),
        TypeError,
        r"weights: expected float32, got bool \(2, 3\)",
    ),
    "rank 0": (
        bad(lambda x, d, *_: ghost.kron_sketch(x, d, 0, 0, 3)),
        ValueError,
        r"out_rank: expected an integer in \[1, 1048576\), got int 0",
    ),
    "rank type": (
        bad(lambda x, d, *_: ghost.kron_sketch(x, d, 0, 2, 3.0)),
        TypeError,
        "in_rank: expected an integer, got float 3.0",
    ),
    "implementation": (
        bad(lambda x, d, y, *_: ghost.ghost_dot(x, d, y, impl="numba")),
        KernelUnavailableError,
        "ghost_dot: impl='numba' cannot run",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_float64_has_no_kernel(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(wide, "capability", lambda device: (9, 0))
    x, d, y = (draw(*n).double() for n in ((2, 3, 5), (2, 3, 4), (4, 5)))
    a, s = torch.zeros(5, 5).double(), torch.zeros(4, 4).double()
    for call in (
        lambda: ghost.ghost_dot(x, d, y, impl="triton"),
        lambda: ghost.ghost_dot_low_rank(x, d, y[:, :2], y.T[:, :2], impl="triton"),
        lambda: ghost.pairwise_ghost(x, d, x, d, impl="triton"),
        lambda: ghost.kron_cov_(a, s, x, d, impl="triton"),
        lambda: ghost.kron_sketch(x, d, 0, 1, 1, impl="triton"),
    ):
        with pytest.raises(KernelUnavailableError, match=r"float64 has no kernel.*reference"):
            call()
