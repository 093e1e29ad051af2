"""Steps of a perturbed run against float64, however small the perturbation, and their rounding."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.patching import (
    Rounded,
    activation_delta,
    combine_norm,
    delta_linear,
    launch,
    op,
    prefix_norm,
    quantize_rows,
    reference,
)
from shared_kernels.testing import check_op
from torch.nn import functional as F

F32, F64, BF16, FP8 = torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn
IMPLS = ["reference", "triton"]
KINDS = ["rms", "layer", "none"]
ACTS = ["silu", "gelu", "gelu_tanh", "relu"]
HALF_EPS = 2.0**-24


def place(impl, kernel_device):
    return kernel_device if impl == "triton" else "cpu"


def drawer(seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def make(lists, rows=3, examples=2, tokens=3, width=20, *, narrow=False, size=1.0, dtype=F32,
         device="cpu", gain=True):  # fmt: skip
    """Arguments of `combine_norm`, positional and by keyword, for lists of entries."""
    draw = drawer(len(lists) + width, device)
    positions = examples * tokens
    flat = list(itertools.chain(*lists))
    slots = max([0, *(e + 1 for e in flat)]), max([0, *(-e for e in flat)])
    x = draw(len(lists), examples if narrow else positions, width) + 0.3
    at = torch.arange(examples, device=device) * tokens + tokens - 1
    args = (
        x,
        (size * draw(slots[0], rows, positions, width)).to(dtype),
        (size * draw(slots[1], rows, examples, width)).to(dtype),
        torch.tensor([0, *itertools.accumulate(len(li) for li in lists)]).int().to(device),
        torch.tensor(flat).int().to(device),
    )
    weight = draw(width) if gain else None
    return args, {"at": at if narrow else None, "weight": weight}


def doubled(values):
    """The same arguments in float64."""

    def double(value):
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floats else value

    if isinstance(values, dict):
        return {name: double(value) for name, value in values.items()}
    return tuple(double(value) for value in values)


def numbers(found):
    """What rounded values stand for, in float64."""
    values = found.values.double()
    return values if found.scale is None else values * found.scale[..., None].double()


def rounding(exact, found, interpreted=False):
    """How far the nearest number of a dtype may be, or the next one where casts truncate."""
    if found.values.dtype == FP8:
        return exact.abs() / 16 + found.scale[..., None].double() / 1023
    relative = {F32: HALF_EPS, BF16: 2.0**-7 if interpreted else 2.0**-8}[found.values.dtype]
    return 1.001 * relative * exact.abs()


def norm_bound(x, a, terms, weight, kind, eps, count):
    """Bound of the error before the last rounding, for a sum of ``count`` terms of that size.

    Every sum of D walks at random. Each quantity is in proportion to `a`; the error of `a` itself
    grows where x + a cancels and is divided by its small root, and so does that of centring.
    """
    steps = 2 * (x.shape[-1] ** 0.5 + 16) * HALF_EPS
    error = count * HALF_EPS * terms
    if kind == "none":
        return error
    mean = lambda values: values.mean(-1, keepdim=True)  # noqa: E731
    size = 0
    if kind == "layer":
        size = x.abs() + mean(x).abs()
        x, a, error = x - mean(x), a - mean(a), error + mean(error)
        terms = terms + mean(terms)
    whole = x + a
    root, moved = (mean(x**2) + eps).sqrt(), (mean(whole**2) + eps).sqrt()
    change = mean(terms * (2 * x.abs() + terms)) / (root * moved * (root + moved))
    bound = steps * (terms / root + (whole.abs() + size) * change)
    bound = bound + error / moved + whole.abs() * mean(whole.abs() * error) / moved**3
    return bound if weight is None else bound * weight.abs()


def assert_close(found, exact, bound, interpreted=False):
    error = (numbers(found) - exact).abs()
    allowed = bound * (1.1 if found.values.dtype == FP8 else 1) + 1e-37
    allowed = allowed + rounding(exact.abs() + bound, found, interpreted)
    assert bool((error <= allowed).all()), (
        f"{(error / allowed).max().item():.2f} of what is allowed"
    )


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a, b = a.cpu(), b.cpu()
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            missing = a.float().isnan()
            assert torch.equal(missing, b.float().isnan())
            assert torch.equal(a.float()[~missing], b.float()[~missing])


def check_combine(args, kwargs, impl, kind="rms", dtype=F32, eps=1e-6):
    if kind == "none":
        kwargs = kwargs | {"weight": None}
    found = combine_norm(*args, **kwargs, kind=kind, dtype=dtype, eps=eps, impl=impl)
    x, wide, narrow, offsets, entries = doubled(args)
    options = {"kind": kind, "eps": eps, "dtype": F64, "impl": "reference"}
    exact = combine_norm(x, wide, narrow, offsets, entries, **doubled(kwargs), **options)
    options["kind"] = "none"
    a, terms = (
        combine_norm(x, w, n, offsets, entries, at=kwargs["at"], **options).values
        for w, n in ((wide, narrow), (wide.abs(), narrow.abs()))
    )
    count = int(offsets.diff().max()) if len(x) else 0
    weight = None if kwargs["weight"] is None else kwargs["weight"].double()
    bound = norm_bound(x[:, None], a, terms, weight, kind, eps, count)
    interpreted = impl == "triton" and x.device.type == "cpu"
    assert found.values.dtype == dtype
    assert (found.scale is None) == (dtype != FP8)
    assert_close(found, exact.values, bound, interpreted)
    return found


LISTS = ([0, 1], [], [2, 0, 1, 2])
MIXED = ([-1, 0], [], [-2], [1, -1, 0, -2, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [False, True])
def test_the_definition_is_a_difference_of_norms(kind, narrow):
    (x, wide, slim, offsets, entries), kwargs = make(MIXED if narrow else LISTS, narrow=narrow)
    x, wide, slim, weight = x.double(), wide.double(), slim.double(), kwargs["weight"].double()
    weight = None if kind == "none" else weight
    found = combine_norm(
        x, wide, slim, offsets, entries, at=kwargs["at"], weight=weight, kind=kind, dtype=F64
    )

    def norm(h):
        if kind == "none":
            return h
        if kind == "rms":
            return F.rms_norm(h, h.shape[-1:], weight, 1e-6)
        return F.layer_norm(h, h.shape[-1:], weight, eps=1e-6)

    for group, li in enumerate(MIXED if narrow else LISTS):
        for row in range(3):
            a = torch.zeros_like(x[group])
            for e in li:
                if e < 0:
                    a += slim[-1 - e, row]
                else:
                    a += wide[e, row, 2::3] if narrow else wide[e, row]
            wanted = norm(x[group] + a) - norm(x[group])
            torch.testing.assert_close(found.values[group, row], wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_in_proportion_to_the_perturbation(kernel_device, impl, kind):
    device = place(impl, kernel_device)
    for size in (1e-7, 1e-3, 1.0):
        for narrow, gain in ((False, True), (True, False)):
            args, kwargs = make(
                MIXED if narrow else LISTS, narrow=narrow, size=size, device=device, gain=gain
            )
            found = check_combine(args, kwargs, impl, kind)
            assert not found.values[1].any()
            assert 0.1 * size < found.values.abs().max() < 100 * size


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_all_that_was_there_is_taken_away(kernel_device, impl, kind):
    device = place(impl, kernel_device)
    (x, wide, *rest), kwargs = make(([0],), width=70, device=device)
    for left in (0.0, 1e-3):
        check_combine((x, (x[:, None] * (left - 1)).expand(wide.shape), *rest), kwargs, impl, kind)
    options = {**kwargs, "kind": kind, "impl": impl}
    found = combine_norm(x, (-x[:, None]).expand(wide.shape), *rest, **options)
    norm = F.rms_norm if kind == "rms" else F.layer_norm
    wanted = -norm(x[0], (70,), kwargs["weight"], eps=1e-6)
    torch.testing.assert_close(found.values[0, 1], wanted, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16, FP8])
@pytest.mark.parametrize("kept", [F32, BF16])
def test_dtypes_of_deltas_and_results(kernel_device, impl, dtype, kept):
    device = place(impl, kernel_device)
    for kind, narrow in (("rms", True), ("layer", False), ("none", True)):
        args, kwargs = make(
            MIXED if narrow else LISTS, narrow=narrow, size=0.01, dtype=kept, device=device
        )
        check_combine(args, kwargs, impl, kind, dtype)


def test_codes_are_those_of_the_float32_results(kernel_device):
    exactly = ["none"] if kernel_device == "cuda" else KINDS
    args, kwargs = make(MIXED, narrow=True, width=67, size=0.01, device=kernel_device)
    for kind in exactly:
        options = {**kwargs, "weight": None, "kind": kind, "impl": "triton"}
        whole = combine_norm(*args, **options).values
        assert_same(combine_norm(*args, **options, dtype=FP8), reference.rounded(whole, FP8))
    x, moved = args[0][0], args[1][:, 0]
    picked, drop = torch.tensor([0, 2, 1]), torch.tensor([True, False, True])
    picked, drop = picked.to(kernel_device), drop.to(kernel_device)
    for kind in exactly:
        options = {"at": kwargs["at"], "kind": kind, "impl": "triton"}
        whole = prefix_norm(x, moved, picked, drop, **options).values
        found = prefix_norm(x, moved, picked, drop, **options, dtype=FP8)
        assert_same(found, reference.rounded(whole, FP8))


def identity(rows, impl, device):
    """Round rows of float32 numbers: a receiver of one sender without a norm."""
    wide = rows.to(device)[None, :, None]
    offsets, entries = torch.tensor([0, 1]), torch.tensor([0])
    return combine_norm(
        torch.zeros(1, 1, rows.shape[-1], device=device), wide, wide[:0],
        offsets.int().to(device), entries.int().to(device), kind="none", dtype=FP8, impl=impl,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_rounding_to_fp8(kernel_device, impl):
    device = place(impl, kernel_device)
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(float(end))) for end in (0, 500)]
    values = torch.cat([codes, middles, *beside, torch.tensor([-0.0])])
    values = torch.cat([values, -values])
    assert values.abs().amax() == 448
    nan, inf = float("nan"), float("inf")
    odd = torch.zeros(8, len(values))
    for row, some in enumerate(
        ([0.0], [nan, 1, -2], [inf, 1, -3], [1e-45, -1e-45], [1e-40, 3e-39], [3e38, -1e30, 1e-30],
         [1.1754943508222875e-38 * 448, 1e-38], [-nan, -inf])
    ):  # fmt: skip
        odd[row, : len(some)] = torch.tensor(some)
    found = identity(torch.stack([values, values / 3, values * 2**-100]), impl, device)
    # powers of two as scales: codes are casts
    for row in (0, 2):
        assert torch.equal(found.values[0, row, 0].cpu().float(), values.to(FP8).float())
    assert found.scale[0, 0, 0] == 1
    assert found.scale[0, 2, 0] == 2.0**-100
    some = torch.cat([odd, torch.randn(8, len(values), generator=torch.Generator().manual_seed(0))])
    result = identity(some, impl, device)
    finite = some.isfinite().all(-1)
    assert torch.equal(result.values[0, :, 0].cpu().float().isfinite().all(-1), finite)
    assert result.scale[0, 0, 0] == 1
    assert bool((numbers(result)[0, finite, 0].cpu() - some[finite].double()).abs().amax(-1).le(
        some[finite].double().abs().amax(-1) / 16 + 1e-40).all())  # fmt: skip
    assert_same(result, identity(some, "reference", "cpu"))
    assert_same(
        found, identity(torch.stack([values, values / 3, values * 2**-100]), "reference", "cpu")
    )


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    lists=st.lists(st.lists(st.integers(-2, 2), max_size=4), max_size=3),
    rows=st.integers(0, 3), examples=st.integers(0, 2), width=st.integers(1, 70),
    narrow=st.booleans(), kind=st.sampled_from(KINDS), dtype=st.sampled_from([F32, BF16, FP8]),
)  # fmt: skip
def test_any_shape(lists, rows, examples, width, narrow, kind, dtype):
    if not narrow:
        lists = [[e for e in li if e >= 0] for li in lists]
    args, kwargs = make(lists, rows, examples, 2, width, narrow=narrow, size=0.1)
    # a width of 1 leaves nothing when centred, and the differences there are all rounding
    eps = 1.0 if width < 4 else 1e-6
    check_combine(args, kwargs, "reference", kind, dtype, eps)
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        check_combine(args, kwargs, "triton", kind, dtype, eps)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_picked_is_not_read(kernel_device, impl):
    device = place(impl, kernel_device)
    (x, wide, slim, offsets, entries), kwargs = make(MIXED, narrow=True, device=device)
    clean = combine_norm(x, wide, slim, offsets, entries, **kwargs, impl=impl)
    nan = float("nan")

    def among(tensor, slots, rows):
        pool = torch.full((slots, rows, *tensor.shape[2:]), nan, device=device)
        return pool[: tensor.shape[0], : tensor.shape[1]].copy_(tensor)

    wide, slim = among(wide, 5, 7), among(slim, 3, 4)
    unread = torch.ones(wide.shape[2], dtype=torch.bool, device=device)
    unread[kwargs["at"]] = False
    wide[:, :, unread] = nan
    assert_same(combine_norm(x, wide, slim, offsets, entries, **kwargs, impl=impl), clean)
    slim[1, 2, 1, 4] = nan
    found = combine_norm(x, wide, slim, offsets, entries, **kwargs, impl=impl, dtype=FP8)
    bad = torch.zeros(4, 3, 2, dtype=torch.bool)
    bad[2:, 2, 1] = True
    assert torch.equal(found.values.float().isnan().any(-1).cpu(), bad)
    assert torch.equal(found.scale.isnan().cpu(), bad)


def make_trials(slots=4, rows=6, tokens=5, width=20, device="cpu", size=1.0):
    draw = drawer(rows + width, device)
    picked = torch.arange(rows, device=device) * 3 % slots
    drop = torch.arange(rows, device=device) % 3 != 1
    differences = (size * draw(2 * slots, tokens, width))[::2]
    return draw(tokens, width) + 0.3, differences, picked, drop, size * draw(tokens, width)


def sequential(differences, picked, drop, start):
    """Every row's delta, by float32 operations one after the other."""
    total, found = start.clone(), []
    for slot, dropped in zip(picked.tolist(), drop.tolist(), strict=True):
        found.append(total - differences[slot])
        total = found[-1] if dropped else total
    return torch.stack(found)


@pytest.mark.parametrize("impl", IMPLS)
def test_trials_are_the_sequential_sum(kernel_device, impl):
    device = place(impl, kernel_device)
    # columns are split among programs above 256
    for width in (1, 20, 257):
        x, differences, picked, drop, start = make_trials(width=width, device=device)
        assert differences.stride(0) == 2 * 5 * width
        at = torch.tensor([4, 0, 3], device=device)
        for began in (start, None):
            wanted = sequential(
                differences, picked, drop, torch.zeros_like(x) if began is None else start
            )
            found = prefix_norm(x, differences, picked, drop, began, kind="none", impl=impl)
            assert torch.equal(found.values, wanted)
            assert torch.equal(
                prefix_norm(
                    x[at], differences, picked, drop, None if began is None else start[at],
                    at=at, kind="none", impl=impl,
                ).values,
                wanted[:, at],
            )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_trials_go_through_the_norm(kernel_device, impl, kind):
    device = place(impl, kernel_device)
    interpreted = impl == "triton" and device == "cpu"
    for size, dtype in ((1e-6, F32), (1.0, F32), (0.01, BF16), (0.01, FP8)):
        x, differences, picked, drop, start = make_trials(device=device, size=size)
        weight = drawer(3, device)(20)
        found = prefix_norm(
            x, differences, picked, drop, start, weight=weight, kind=kind, dtype=dtype, impl=impl
        )
        a = sequential(differences.double(), picked, drop, start.double())
        # subtracting what was dropped from minus the absolute values adds all of them
        terms = -sequential(differences.double().abs(), picked, drop, -start.double().abs())
        norm = F.rms_norm if kind == "rms" else F.layer_norm
        bound = norm_bound(x.double(), a, terms, weight.double(), kind, 1e-6, len(picked))
        new, old = (norm(h, (20,), weight.double(), eps=1e-6) for h in (x.double() + a, x.double()))
        assert_close(found, new - old, bound, interpreted)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 5), tokens=st.integers(0, 4), width=st.integers(1, 300),
    kind=st.sampled_from(KINDS), dtype=st.sampled_from([F32, BF16, FP8]), begin=st.booleans(),
)  # fmt: skip
def test_trials_of_any_shape(rows, tokens, width, kind, dtype, begin):
    args = make_trials(rows=rows, tokens=tokens, width=width)
    args = args if begin else args[:-1]
    found = prefix_norm(*args, kind=kind, dtype=dtype, eps=0.1, impl="reference")
    exact = numbers(prefix_norm(*doubled(args), kind=kind, dtype=F64, eps=0.1))
    assert found.values.shape == (rows, tokens, width)
    results = [(found, False)]
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        results += [(prefix_norm(*args, kind=kind, dtype=dtype, eps=0.1, impl="triton"), True)]
    for result, interpreted in results:
        assert_close(result, exact, torch.full_like(exact, 3e-5), interpreted)


@pytest.mark.parametrize("impl", IMPLS)
def test_not_a_number_in_a_trial_stays_until_it_is_dropped(kernel_device, impl):
    device = place(impl, kernel_device)
    x, differences, _, _, start = make_trials(device=device)
    picked = torch.tensor([0, 1, 0, 1, 2], device=device)
    drop = torch.tensor([True, False, True, True, False], device=device)
    differences[1, 2] = float("nan")
    differences[3] = float("nan")
    found = prefix_norm(x, differences, picked, drop, start, impl=impl).values.isnan().all(-1)
    assert found.any(-1).tolist() == [False, True, False, True, True]
    assert found.sum() == 3


def exact_activation(h, act):
    if act == "silu":
        return h * torch.sigmoid(h)
    if act == "relu":
        return h.clamp(min=0)
    if act == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def check_activation(moved, base, act, gated, impl, dtype=F32):
    found = activation_delta(moved, base, act=act, gated=gated, dtype=dtype, impl=impl)
    h, new = base.double(), base.double() + moved.double()
    if gated:
        (g, u), (g1, u1) = h.chunk(2, -1), new.chunk(2, -1)
        exact = exact_activation(g1, act) * u1 - exact_activation(g, act) * u
        size = g1.abs() * u1.abs() + g.abs() * (u1.abs() + u.abs() + (u1 - u).abs())
    else:
        exact = exact_activation(new, act) - exact_activation(h, act)
        size = h.abs() + new.abs()
    interpreted = impl == "triton" and base.device.type == "cpu"
    # an activation is below its input, which is rounded; exp, erf and tanh are good to a few ulp
    assert_close(found, exact, 24 * HALF_EPS * size + 1e-30, interpreted)
    return found


def make_activations(rows=2, tokens=3, inputs=22, dtype=F32, device="cpu", size=0.5):
    draw = drawer(inputs, device)
    return (size * draw(rows, tokens, inputs)).to(dtype), 3 * draw(tokens, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", ACTS)
def test_activations(kernel_device, impl, act):
    device = place(impl, kernel_device)
    for gated, dtype, kept in itertools.product((False, True), (F32, BF16, FP8), (F32, BF16)):
        check_activation(*make_activations(dtype=kept, device=device), act, gated, impl, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", ACTS)
def test_activations_far_out(kernel_device, impl, act):
    device = place(impl, kernel_device)
    base = torch.tensor([[0.0, -0.0, 80, -80, 1e4, -1e4, 1e-30, -1e-30, 5, -5]], device=device)
    moved = torch.stack([torch.zeros_like(base), base, -2 * base])
    assert not check_activation(moved, base, act, False, impl).values[0].any()
    found = activation_delta(
        moved + torch.tensor([float("nan"), *[0.0] * 9], device=device), base,
        act=act, gated=False, impl=impl,
    ).values.isnan()  # fmt: skip
    assert found[..., 0].all()
    assert not found[..., 1:].any()


@pytest.mark.parametrize("act", ACTS)
def test_codes_of_activations(kernel_device, act, monkeypatch):
    monkeypatch.setattr(launch, "MOST_FEATURES", 32)
    monkeypatch.setattr(launch, "FEATURES", 16)
    for gated in (False, True):
        for features in (1, 32, 33, 50):
            inputs = 2 * features if gated else features
            moved, base = make_activations(inputs=inputs, dtype=BF16, device=kernel_device)
            options = {"act": act, "gated": gated, "impl": "triton"}
            whole = activation_delta(moved, base, **options).values
            found = activation_delta(moved, base, **options, dtype=FP8)
            assert_same(found, reference.rounded(whole, FP8))


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 3), tokens=st.integers(0, 3), features=st.integers(1, 80),
    act=st.sampled_from(ACTS), gated=st.booleans(), dtype=st.sampled_from([F32, BF16, FP8]),
)  # fmt: skip
def test_activations_of_any_shape(rows, tokens, features, act, gated, dtype):
    args = make_activations(rows, tokens, 2 * features if gated else features)
    check_activation(*args, act, gated, "reference", dtype)
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        check_activation(*args, act, gated, "triton", dtype)


def check_linear(delta, weight, dtype):
    """Compare with float64 of the same operands."""
    if dtype == FP8:
        (delta, scale), (weight, weight_scale) = quantize_rows(delta), quantize_rows(weight)
        shape = (2, -1, delta.shape[1])
        delta, scale = delta.view(shape), scale.view(shape[:2])
        found = delta_linear(delta, weight, scale=scale, weight_scale=weight_scale)
        a, b = delta.double() * scale[..., None].double(), weight.double()
        b = b * weight_scale[:, None].double()
    else:
        delta, weight = delta.to(dtype), weight.to(dtype)
        found = delta_linear(delta, weight)
        a, b = delta.double(), weight.double()
    exact, terms = a @ b.T, a.abs() @ b.abs().T
    assert found.dtype == (F32 if dtype == F32 else BF16)
    assert found.shape == exact.shape
    # tensor cores cut sums of fp8 products off at 2^-13 of the largest, a few times before they
    # are added in float32, which rounds
    steps = 2.0**-12 if dtype == FP8 and found.is_cuda else a.shape[-1] ** 0.5 * 2 * HALF_EPS
    bound = steps * terms + rounding(exact, Rounded(found, None))
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [F32, BF16, FP8])
def test_products_of_deltas(dtype):
    draw = drawer(0)
    check_linear(1e-5 * draw(14, 48), draw(32, 48), dtype)


def test_products_in_fp8_take_outliers_and_zeros():
    draw = drawer(1)
    weight, delta = draw(16, 32), draw(4, 32)
    weight[3] *= 1e4
    weight[5] = 0
    delta[1] *= 1e-9
    delta[2] = 0
    codes, scale = quantize_rows(weight)
    torch.testing.assert_close(scale * 448, weight.abs().amax(1).where(weight.any(1), 448.0))
    assert_same((codes, scale), reference.rounded(weight, FP8))
    assert_same(quantize_rows(weight.bfloat16()), quantize_rows(weight.bfloat16().float()))
    check_linear(delta, weight, FP8)
    small = quantize_rows(delta)
    found = delta_linear(small.values, codes, scale=small.scale, weight_scale=scale)
    assert not found[2].any()
    assert not found[:, 5].any()
    none = delta_linear(small.values[:0], codes, scale=small.scale[:0], weight_scale=scale)
    assert none.shape == (0, 16)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, FP8])
def test_products_in_place(dtype):
    draw = drawer(2)
    delta, weight = draw(3, 4, 32), draw(16, 32)
    scales = {}
    if dtype == FP8:
        (delta, scale), (weight, weight_scale) = (
            reference.rounded(delta, FP8),
            quantize_rows(weight),
        )
        scales = {"scale": scale, "weight_scale": weight_scale}
    else:
        delta, weight = delta.to(dtype), weight.to(dtype)
    wanted = delta_linear(delta, weight, **scales)
    room = torch.full((3, 4, 20), 7.0, dtype=wanted.dtype)
    out = room[..., 2:18]
    assert delta_linear(delta, weight, **scales, out=out) is out
    torch.testing.assert_close(out, wanted, rtol=2 * torch.finfo(wanted.dtype).eps, atol=1e-5)
    assert bool((room[..., :2] == 7).all() & (room[..., 18:] == 7).all())
    for shape in ((3, 4, 15), (12, 16)):
        with pytest.raises(ValueError, match="out: expected shape"):
            delta_linear(delta, weight, **scales, out=torch.empty(shape, dtype=wanted.dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_op_checklist(kernel_device, impl):
    device = place(impl, kernel_device)
    for dtype in (F32, FP8):

        def combine(size, dtype=dtype):
            lists = ([0, -1], [], [-2, 1]) if size else ()
            args, kwargs = make(lists, size, width=size + 6, narrow=True, device=device)
            return *args, kwargs["at"], kwargs["weight"], "layer", 1e-6, dtype, impl

        check_op(op.combine_norm, combine, sizes=[2, 0, 1])

        def trials(size, dtype=dtype):
            args = make_trials(rows=size, tokens=3, width=33, device=device)
            return *args, None, None, "none" if size == 3 else "rms", 1e-6, dtype, impl

        check_op(op.prefix_norm, trials, sizes=[2, 0, 1, 3])

        def activations(size, dtype=dtype):
            args = make_activations(rows=size, inputs=2 * size + 2, device=device)
            return *args, "silu", True, dtype, impl

        check_op(op.activation_delta, activations, sizes=[3, 0, 1, 16])


def test_bad_input():
    (x, wide, slim, offsets, entries), kwargs = make(MIXED, narrow=True)
    at, weight = kwargs["at"], kwargs["weight"]
    with pytest.raises(ValueError, match="at: expected a position for each of 2 tokens"):
        combine_norm(x, wide, slim, offsets, entries)
    with pytest.raises(TypeError, match="narrow"):
        combine_norm(x, wide, slim.bfloat16(), offsets, entries, at=at)
    with pytest.raises(ValueError, match=r"narrow: expected shape \(any, 3, 2, 20\)"):
        combine_norm(x, wide, slim[:, :, :1].contiguous(), offsets, entries, at=at)
    with pytest.raises(ValueError, match=r"wide: .*after the first 2"):
        combine_norm(
            x, wide.transpose(2, 3).contiguous().transpose(2, 3), slim, offsets, entries, at=at
        )
    with pytest.raises(TypeError, match="entries: expected int32"):
        combine_norm(x, wide, slim, offsets, entries.long(), at=at)
    with pytest.raises(ValueError, match=r"offsets: expected shape \(5,\)"):
        combine_norm(x, wide, slim, offsets[1:], entries, at=at)
    with pytest.raises(ValueError, match="weight: expected None"):
        combine_norm(x, wide, slim, offsets, entries, at=at, weight=weight, kind="none")
    with pytest.raises(ValueError, match="kind"):
        combine_norm(x, wide, slim, offsets, entries, at=at, kind="batch")
    with pytest.raises(TypeError, match=r"dtype: expected .*float8_e4m3fn"):
        combine_norm(x, wide, slim, offsets, entries, at=at, dtype=torch.float16)
    with pytest.raises(ValueError, match="a width of at least 1"):
        combine_norm(x[..., :0].contiguous(), wide, slim, offsets, entries, at=at)
    x, differences, picked, drop, start = make_trials()
    with pytest.raises(ValueError, match="one or more slots"):
        prefix_norm(x, differences[:0], picked, drop)
    with pytest.raises(TypeError, match="drop: expected bool"):
        prefix_norm(x, differences, picked, drop.int())
    with pytest.raises(ValueError, match=r"start: expected shape \(5, 20\)"):
        prefix_norm(x, differences, picked, drop, start[1:])
    with pytest.raises(ValueError, match="at: expected a position"):
        prefix_norm(x[1:], differences, picked, drop)
    moved, base = make_activations(inputs=21)
    with pytest.raises(ValueError, match="an even width"):
        activation_delta(moved, base, act="silu", gated=True)
    with pytest.raises(ValueError, match="act"):
        activation_delta(moved, base, act="tanh", gated=False)
    with pytest.raises(ValueError, match=r"base: expected shape \(3, 21\)"):
        activation_delta(moved, base[1:], act="silu", gated=False)
    codes, scale = quantize_rows(torch.ones(8, 32))
    with pytest.raises(ValueError, match="multiples of 16 in fp8"):
        delta_linear(codes, codes, scale=scale, weight_scale=scale)
    with pytest.raises(ValueError, match="weight_scale: expected a float32 tensor"):
        delta_linear(codes, codes, scale=scale)
    with pytest.raises(ValueError, match="scale: expected None"):
        delta_linear(torch.ones(2, 8), torch.ones(3, 8), scale=torch.ones(2))
    with pytest.raises(TypeError, match="delta: expected float32"):
        delta_linear(torch.ones(2, 8).bfloat16(), torch.ones(3, 8))
    with pytest.raises(TypeError, match="out: expected float32"):
        delta_linear(torch.ones(2, 8), torch.ones(3, 8), out=torch.empty(2, 3).bfloat16())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_kernel_says_what_it_cannot_do(dtype):
    pytest.importorskip("triton")
    args, kwargs = make(LISTS, width=2)
    with pytest.raises(launch.KernelUnavailableError, match="float64 has no kernel"):
        launch.combine_norm(*args, *kwargs.values(), "rms", 1e-6, F64)
    moved, base = make_activations(dtype=dtype)
    with pytest.raises(launch.KernelUnavailableError, match="float64 has no kernel"):
        launch.activation_delta(moved, base.double(), "silu", False, dtype)
    wide = torch.zeros(1, launch.MOST_WIDTH + 1)
    assert "width" in launch.norm_unsupported(wide, wide, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 768, 2048, 4096, 12288])
@pytest.mark.parametrize("kind", KINDS)
def test_receivers_on_a_gpu(cuda, width, kind):
    wide = [list(range(5)), [], [3], list(range(19))]
    mixed = [[-1, 0, -3], [], [-2], [*range(9), *range(-6, 0)]]
    for narrow, size, kept, dtype in (
        (False, 1e-4, F32, F32), (False, 0.1, BF16, BF16), (False, 0.01, BF16, FP8),
        (True, 1.0, F32, FP8), (True, 1e-5, BF16, F32),
    ):  # fmt: skip
        args, kwargs = make(
            mixed if narrow else wide, 5, 4, 16, width, narrow=narrow, size=size, dtype=kept,
            device=cuda,
        )  # fmt: skip
        found = check_combine(args, kwargs, "triton", kind, dtype)
        again = {**kwargs, "weight": None if kind == "none" else kwargs["weight"]}
        assert_same(found, combine_norm(*args, **again, kind=kind, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_trials_on_a_gpu(cuda, width, kind):
    for tokens, dtype in ((512, F32), (64, BF16), (64, FP8)):
        args = make_trials(8, 64, tokens, width, device=cuda, size=0.05)
        found = prefix_norm(*args, kind=kind, dtype=dtype)
        x, differences, picked, drop, start = args
        a = sequential(differences, picked, drop, start)
        if kind == "none":
            assert_same(found, Rounded(a, None) if dtype == F32 else reference_of(a, dtype))
            continue
        terms = -sequential(differences.double().abs(), picked, drop, -start.double().abs())
        exact = prefix_norm(*doubled(args), kind=kind, dtype=F64, impl="reference").values
        exact_a = sequential(differences.double(), picked, drop, start.double())
        bound = norm_bound(x.double(), exact_a, terms, None, kind, 1e-6, len(picked))
        assert_close(found, exact, bound)
        assert_same(found, prefix_norm(*args, kind=kind, dtype=dtype))


def reference_of(values, dtype):
    codes, scale = reference.rounded(values, dtype)
    return Rounded(codes, scale if dtype == FP8 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
def test_activations_on_a_gpu(cuda, act):
    for gated, features, kept in ((True, 1536, BF16), (False, 3072, F32), (True, 28672, BF16)):
        inputs = 2 * features if gated else features
        moved, base = make_activations(8, 130, inputs, kept, cuda)
        for dtype in (F32, BF16, FP8):
            found = check_activation(moved, base, act, gated, "triton", dtype)
            if dtype == F32:
                whole = found.values
            else:
                assert_same(found, reference_of(whole, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, FP8])
def test_products_on_a_gpu(cuda, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    draw = drawer(0, cuda)
    for tokens, outputs, inputs in ((1280, 2304, 768), (2, 16, 16), (130, 4096, 11008)):
        check_linear(1e-3 * draw(tokens, inputs), draw(outputs, inputs), dtype)
