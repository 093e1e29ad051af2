"""Ghost operations: per-sample gradients of a layer, every implementation against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops import ghost
from shared_kernels.ops.ghost import reference
from shared_kernels.testing import (
    SUM_TOLERANCES,
    assert_same_bits,
    assert_sum_within,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: b, t, i, o. Blocks are 64 or 128 wide.
SHAPES = {
    "small": (3, 5, 7, 4),
    "one token": (70, 1, 9, 3),
    "around a block": (2, 65, 33, 66),
    "single": (1, 1, 1, 1),
    "no samples": (0, 3, 4, 5),
    "no tokens": (2, 0, 4, 5),
    "no inputs": (2, 3, 0, 5),
}
FEW_SHAPES = ("small", "around a block")
VARIANTS = [
    *(("reference", dtype, "cpu", True) for dtype in (F64, F32, BF16)),
    *(("triton", dtype, "interpreter", dtype == F32) for dtype in (F32, BF16, FP16)),
    *(
        pytest.param(("triton", dtype, "cuda", True), marks=pytest.mark.gpu)
        for dtype in (F32, BF16, FP16)
    ),
]


def _cases():
    for entry in VARIANTS:
        marks = getattr(entry, "marks", ())
        (values,) = getattr(entry, "values", (entry,))
        for shape in SHAPES if values[3] else FEW_SHAPES:
            name = f"{values[0]}-{str(values[1]).removeprefix('torch.')}-{values[2]}-{shape}"
            yield pytest.param((*values[:3], shape), marks=marks, id=name)


@pytest.fixture(params=_cases())
def case(request):
    """Implementation, dtype, device and sizes."""
    impl, dtype, where, shape = request.param
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if where == "interpreter":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled for the GPU in this process")
    return impl, dtype, "cuda" if where == "cuda" else "cpu", SHAPES[shape]


def draw(*shape, dtype=F32, device="cpu", seed=0, strided=False) -> Tensor:
    """Random numbers with a mean, equal for equal arguments; strided ones turned and with gaps."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if strided:
        wide = torch.randn(*reversed(shape[:-1]), shape[-1] * 2 + 1, generator=generator)
        turned = wide.permute(*reversed(range(len(shape) - 1)), len(shape) - 1)
        return turned.to(device, dtype)[..., 1::2] + 0.25
    return torch.randn(*shape, generator=generator).add_(0.25).to(device, dtype)


def half(samples, tokens, device, seed=9) -> Tensor:
    """A mask that keeps about half of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(samples, tokens, generator=generator) < 0.5).to(device)


def spoiled(x, mask) -> Tensor:
    """A copy with what must not be read outside the mask."""
    return torch.where(mask[..., None], x, float("nan"))


def zeroed(x, mask) -> Tensor:
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def gradients(x, d) -> Tensor:
    """Float64 per-sample gradients (b, o, i)."""
    return d.double().mT @ x.double()


def assert_near(found, exact, terms, name, *counts, operands):
    assert found.dtype == (F64 if operands.dtype == F64 else F32)
    assert_sum_within(found, exact, terms, SUM_TOLERANCES[name], *counts, operands=operands)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [None, 3])
def test_ghost_dot(case, masked, queries):
    impl, dtype, device, (b, t, i, o) = case
    x, d = draw(b, t, i, dtype=dtype, device=device), draw(b, t, o, dtype=dtype, device=device)
    shape = (o, i) if queries is None else (queries, o, i)
    y = draw(*shape, dtype=dtype, device=device)
    mask = half(b, t, device) if masked else None
    given_x, given_d = (spoiled(m, mask) if masked else m for m in (x, d))
    found = ghost.ghost_dot(given_x, given_d, y, mask=mask, impl=impl)
    x, d = zeroed(x, mask), zeroed(d, mask)
    index = "oi,boi->b" if queries is None else "qoi,boi->qb"
    exact = torch.einsum(index, y.double(), gradients(x, d))
    terms = torch.einsum(index, y.double().abs(), gradients(x.abs(), d.abs()))
    assert_near(found, exact, terms, "ghost.dot", i, o, t, operands=x)


@pytest.mark.parametrize(("rank", "queries"), [(3, None), (70, 2), (0, 1)])
def test_ghost_dot_low_rank(case, rank, queries):
    impl, dtype, device, (b, t, i, o) = case
    x, d = draw(b, t, i, dtype=dtype, device=device), draw(b, t, o, dtype=dtype, device=device)
    outer = () if queries is None else (queries,)
    u, v = (draw(*outer, n, rank, dtype=dtype, device=device) for n in (o, i))
    mask = half(b, t, device)
    found = ghost.ghost_dot_low_rank(spoiled(x, mask), spoiled(d, mask), u, v, mask=mask, impl=impl)
    x, d = zeroed(x, mask), zeroed(d, mask)
    index = "oi,boi->b" if queries is None else "qoi,boi->qb"
    exact = torch.einsum(index, u.double() @ v.double().mT, gradients(x, d))
    absolute = u.double().abs() @ v.double().abs().mT
    terms = torch.einsum(index, absolute, gradients(x.abs(), d.abs()))
    assert_near(found, exact, terms, "ghost.low_rank", i, o, rank, t, operands=x)


@pytest.mark.parametrize("way", ["gram", "product"])
@pytest.mark.parametrize("masked", [False, True])
def test_pairwise_ghost(case, masked, way):
    impl, dtype, device, (b, t, i, o) = case
    other = (b + 1, max(1, t // 2)) if t else (b + 1, 2)
    sets, kept = [], []
    for samples, tokens in ((b, t), other):
        pair = [draw(samples, tokens, n, dtype=dtype, device=device) for n in (i, o)]
        mask = half(samples, tokens, device) if masked else None
        sets.append([*(spoiled(m, mask) if masked else m for m in pair), mask])
        kept.append([zeroed(m, mask) for m in pair])
    (x1, d1, mask1), (x2, d2, mask2) = sets
    found = ghost.pairwise_ghost(x1, d1, x2, d2, mask1=mask1, mask2=mask2, way=way, impl=impl)
    exact = torch.einsum("aoi,boi->ab", *(gradients(*pair) for pair in kept))
    terms = torch.einsum("aoi,boi->ab", *(gradients(*(m.abs() for m in pair)) for pair in kept))
    assert_near(found, exact, terms, f"ghost.{way}", i, o, t, other[1], operands=x1)


@pytest.mark.parametrize("option", ["plain", "masked", "weighted", "both"])
def test_kron_cov(case, option):
    impl, dtype, device, (b, t, i, o) = case
    x, d = draw(b, t, i, dtype=dtype, device=device), draw(b, t, o, dtype=dtype, device=device)
    dtype = F64 if dtype == F64 else F32
    mask = half(b, t, device) if option in ("masked", "both") else None
    weights = None
    live = torch.ones(b, t, device=device, dtype=F64)
    if mask is not None:
        live = live * mask
    if option in ("weighted", "both"):
        weights = draw(b, t, dtype=dtype, device=device) * half(b, t, device, seed=10)
        live = live * weights
    given_x, given_d = (spoiled(m, live != 0) for m in (x, d))
    a, s = torch.full((i, i), 0.5, dtype=dtype), torch.full((o, o), 0.5, dtype=dtype)
    # outputs with gaps and turned
    a, s = a.to(device), torch.stack([s, s], 2).to(device)[..., 1].T
    ghost.kron_cov_(a, s, given_x, given_d, mask=mask, weights=weights, impl=impl)
    for found, rows in ((a, x), (s, d)):
        wide = zeroed(rows.double(), live != 0)
        exact = torch.einsum("bt,btm,btn->mn", live, wide, wide) + 0.5
        terms = torch.einsum("bt,btm,btn->mn", live.abs(), wide.abs(), wide.abs()) + 0.5
        assert_near(found, exact, terms, "ghost.cov", b * t, operands=rows)


@pytest.mark.parametrize(("out_rank", "in_rank"), [(3, 5), (65, 2)])
def test_kron_sketch(case, out_rank, in_rank):
    impl, dtype, device, (b, t, i, o) = case
    x, d = draw(b, t, i, dtype=dtype, device=device), draw(b, t, o, dtype=dtype, device=device)
    mask = half(b, t, device)
    seed = -3
    found = ghost.kron_sketch(
        spoiled(x, mask), spoiled(d, mask), seed, out_rank, in_rank, mask=mask, impl=impl
    )
    x, d = zeroed(x, mask), zeroed(d, mask)
    left = reference.signs(o, out_rank, seed, 0, x.device, F64)
    right = reference.signs(i, in_rank, seed, 1, x.device, F64)
    scale = (out_rank * in_rank) ** -0.5
    exact = (left.T @ gradients(x, d) @ right).flatten(1) * scale
    terms = gradients(x.abs(), d.abs()).sum((1, 2))[:, None].expand_as(exact) * scale
    assert_near(found, exact, terms, "ghost.sketch", i, o, t, operands=x)


@pytest.fixture(scope="module")
def layer():
    """Inputs, output gradients and, by vmap(grad), per-sample gradients of an nn.Linear."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5, bias=False, dtype=F64)
    x, target = torch.randn(4, 7, 6, dtype=F64), torch.randn(4, 7, 5, dtype=F64)

    def loss(parameters, x, target):
        out = torch.func.functional_call(linear, parameters, (x,))
        return (out.tanh() - target).pow(2).sum() + out.logsumexp(-1).sum()

    parameters = {name: p.detach() for name, p in linear.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)["weight"]
    out = linear(x).detach().requires_grad_()
    total = (out.tanh() - target).pow(2).sum() + out.logsumexp(-1).sum()
    (d,) = torch.autograd.grad(total, out)
    return x, d, grads


def close(found, exact):
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_they_are_what_vmap_of_grad_gives(layer):
    x, d, grads = layer
    y, u, v = (torch.randn(*shape, dtype=F64) for shape in ((3, 5, 6), (3, 5, 2), (3, 6, 2)))
    close(ghost.ghost_dot(x, d, y), torch.einsum("qoi,boi->qb", y, grads))
    close(ghost.ghost_dot(x, d, y[1]), (y[1] * grads).sum((1, 2)))
    exact = torch.einsum("qoi,boi->qb", u @ v.mT, grads)
    close(ghost.ghost_dot_low_rank(x, d, u, v), exact)
    close(ghost.ghost_dot_low_rank(x, d, u[2], v[2]), exact[2])
    for way in ("auto", "gram", "product"):
        found = ghost.pairwise_ghost(x, d, x[1:3], d[1:3], way=way)
        close(found, grads.flatten(1) @ grads[1:3].flatten(1).T)


def test_a_sketch_preserves_inner_products_on_average(layer):
    x, d, grads = layer
    samples = []
    for seed in range(200):
        z = ghost.kron_sketch(x, d, seed, 8, 4)
        samples.append(z @ z.T)
    samples = torch.stack(samples)
    exact = grads.flatten(1) @ grads.flatten(1).T
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - exact).abs() <= 4 * error).all())
    # and the two sides are drawn apart: the error falls with either rank
    spread = lambda *ranks: torch.stack(  # noqa: E731
        [ghost.kron_sketch(x, d, seed, *ranks).square().sum(1) for seed in range(60)]
    ).std(0)
    assert bool((spread(32, 4) < spread(2, 4)).all())
    assert bool((spread(8, 32) < spread(8, 1)).all())


def test_the_kernel_draws_the_signs_of_the_reference(kernel_device):
    # one-hot rows: entry (p, q) of a sketch is R_o[row, p] R_i[column, q]
    for i, o, seed in ((130, 67, 5), (67, 130, -(1 << 62))):
        x = torch.eye(i, device=kernel_device)[:, None]
        d = torch.eye(o, device=kernel_device)[torch.arange(i) % o][:, None]
        found = ghost.kron_sketch(x, d, seed, 66, 4, impl="triton")
        assert_same_bits(found, ghost.kron_sketch(x.cpu(), d.cpu(), seed, 66, 4, impl="reference"))
        assert torch.unique(found.abs()).numel() == 1


def test_a_larger_rank_keeps_the_columns():
    x, d = draw(2, 3, 70), draw(2, 3, 5)
    small = ghost.kron_sketch(x, d, 1, 4, 3).view(2, 4, 3)
    large = ghost.kron_sketch(x, d, 1, 64, 100).view(2, 64, 100)
    large = large[:, :4, :3] * (64 * 100 / 12) ** 0.5
    torch.testing.assert_close(large, small)


def test_the_sides_of_a_sketch_and_its_seeds_have_other_signs():
    made = [
        reference.signs(64, 64, seed, side, torch.device("cpu"), F32)
        for seed, side in ((0, 0), (0, 1), (1, 0))
    ]
    for one in range(3):
        assert abs(float(made[one].mean())) < 4 / 64
        for two in range(one):
            assert abs(float((made[one] * made[two]).mean())) < 4 / 64


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_any_strides(impl, kernel_device):
    device = kernel_device if impl == "triton" else "cpu"
    b, t, i, o = 3, 5, 9, 7
    make = lambda *shape: draw(*shape, device=device, strided=True)  # noqa: E731
    x, d, y, u, v = make(b, t, i), make(b, t, o), make(2, o, i), make(2, o, 3), make(2, i, 3)
    mask = half(t, b, device).T
    weights = draw(b, 2 * t, device=device)[:, ::2]
    assert not any(m.is_contiguous() for m in (x, d, y, u, v, mask, weights))
    plain = [m.contiguous() for m in (x, d, y, u, v, mask, weights)]

    def all_of(x, d, y, u, v, mask, weights):
        a, s = torch.zeros(i, i, device=device), torch.zeros(o, o, device=device)
        ghost.kron_cov_(a, s, x, d, mask=mask, weights=weights, impl=impl)
        return [
            ghost.ghost_dot(x, d, y, mask=mask, impl=impl),
            ghost.ghost_dot_low_rank(x, d, u, v, mask=mask, impl=impl),
            ghost.pairwise_ghost(x, d, x, d, mask1=mask, mask2=mask, way="gram", impl=impl),
            ghost.pairwise_ghost(x, d, x, d, mask1=mask, mask2=mask, way="product", impl=impl),
            ghost.kron_sketch(x, d, 7, 3, 4, mask=mask, impl=impl),
            a,
            s,
        ]

    for found, expected in zip(all_of(x, d, y, u, v, mask, weights), all_of(*plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # samples that share their memory
    same = x[:1].expand(b, t, i)
    found = ghost.ghost_dot(same, d, y, impl=impl)
    torch.testing.assert_close(
        found, ghost.ghost_dot(same.contiguous(), d, y, impl=impl), rtol=1e-5, atol=1e-4
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(0, 9) for _ in range(4))),
    others=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    rank=st.integers(1, 70),
    strided=st.booleans(),
)
def test_any_shape(sizes, others, rank, strided):
    b, t, i, o = sizes
    make = lambda *shape: draw(*shape, dtype=F64, strided=strided)  # noqa: E731
    x, d, y, u, v = make(b, t, i), make(b, t, o), make(2, o, i), make(2, o, rank), make(2, i, rank)
    x2, d2 = make(*others, i), make(*others, o)
    grads, grads2 = gradients(x, d), gradients(x2, d2)
    close(ghost.ghost_dot(x, d, y), torch.einsum("qoi,boi->qb", y, grads))
    exact = torch.einsum("qoi,boi->qb", u @ v.mT, grads)
    close(ghost.ghost_dot_low_rank(x, d, u, v), exact)
    for way in ("auto", "gram", "product"):
        found = ghost.pairwise_ghost(x, d, x2, d2, way=way)
        close(found, torch.einsum("aoi,boi->ab", grads, grads2))
    a, s = torch.zeros(i, i, dtype=F64), torch.zeros(o, o, dtype=F64)
    ghost.kron_cov_(a, s, x, d)
    close(a, torch.einsum("btm,btn->mn", x, x))
    close(s, torch.einsum("btm,btn->mn", d, d))
    assert ghost.kron_sketch(x, d, 0, rank, 2).shape == (b, 2 * rank)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_reference_works_in_pieces(monkeypatch, tokens):
    x, d, y = draw(5, tokens, 6, dtype=F64), draw(5, tokens, 4, dtype=F64), draw(4, 6, dtype=F64)
    a, s = torch.zeros(6, 6, dtype=F64), torch.zeros(4, 4, dtype=F64)
    for rows, chunk in ((7, 20), (1, 1), (1 << 20, 1 << 20)):
        monkeypatch.setattr(reference, "_ROWS", rows)
        monkeypatch.setattr(reference, "_GRAM_ROWS", rows)
        monkeypatch.setattr(reference, "_PRODUCT_CHUNK", chunk)
        grads = gradients(x, d)
        close(ghost.ghost_dot(x, d, y), torch.einsum("oi,boi->b", y, grads))
        for way in ("gram", "product"):
            found = ghost.pairwise_ghost(x, d, x, d, way=way)
            close(found, torch.einsum("aoi,boi->ab", grads, grads))
        ghost.kron_cov_(a.zero_(), s.zero_(), x, d)
        close(a, torch.einsum("btm,btn->mn", x, x))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_gradient_of_a_sample_is_formed():
    b, t, i, o = 6, 2, 90, 80
    x, d, y = draw(b, t, i), draw(b, t, o), draw(3, o, i)
    with _Largest() as largest:
        reference.ghost_dot(x, d, y, None)
        reference.ghost_dot_low_rank(x, d, y[..., :4], y.mT[..., :4].contiguous(), None)
        reference.pairwise_ghost(x, d, x, d, None, None, "gram")
        reference.kron_sketch(x, d, 0, 4, 4, None)
    assert largest.elements < b * o * i


def test_the_way_is_the_one_of_fewer_multiplications():
    # pairs of short samples, of long ones, and of tokens of one matrix with two others
    assert ghost.pairwise_way(64, 16, 64, 16, 576, 576) == "gram"
    assert ghost.pairwise_way(64, 512, 64, 512, 576, 576) == "product"
    assert ghost.pairwise_way(1, 512, 1, 512, 576, 576) == "gram"
    for sizes in ((3, 4, 5, 6, 7, 8), (20, 9, 30, 2, 5, 5), (2, 30, 2, 30, 4, 3)):
        b1, t1, b2, t2, i, o = sizes
        x1, d1, x2, d2 = draw(b1, t1, i), draw(b1, t1, o), draw(b2, t2, i), draw(b2, t2, o)
        count = {}
        for way in ("gram", "product", "auto"):
            with FlopCounterMode(display=False) as counter:
                reference.pairwise_ghost(x1, d1, x2, d2, None, None, way)
            count[way] = counter.get_total_flops()
        assert count["auto"] == min(count["gram"], count["product"])
        assert count[ghost.pairwise_way(*sizes)] == count["auto"]
