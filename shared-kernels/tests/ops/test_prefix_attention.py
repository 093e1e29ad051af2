"""Attention over a shared prefix: what it computes, on the CPU and in the kernels."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.ops.prefix_attention import (
    FixedLayout,
    PrefixLayout,
    dense,
    launch,
    merge_attention_states,
    op,
    shared_prefix_attention,
)
from shared_kernels.testing import assert_same_bits, check_op
from shared_kernels.testing.prefixes import make_problem

F64 = torch.float64


def assert_right(problem, impl, *, out=2e-6, lse=4e-6):
    """Compare with float64 on the same inputs, relative to the largest output.

    A logit is rounded, as a product of sums and when the maximum is subtracted, by about an epsilon
    of itself, which is the relative error of its weight and, at worst, twice that of the output.
    """
    expected, expected_lse, largest = problem.expected()
    out = max(out, 2 * largest * torch.finfo(problem.tensors[0].dtype).eps)
    found, found_lse = problem.run(shared_prefix_attention, impl=impl)
    assert found.dtype == problem.tensors[0].dtype
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    error = (found.double().cpu() - expected).abs().nan_to_num(float("inf"))
    assert error.numel() == 0 or float(error.max()) <= out * float(scale)
    empty = expected_lse.isinf()
    assert torch.equal(empty, found_lse.cpu().isinf())
    bound = lse * expected_lse[~empty].abs().clamp(min=1)
    assert bool(((found_lse.double().cpu() - expected_lse)[~empty].abs() <= bound).all())


GRID = list(itertools.product((0, 1, 15, 16, 17, 511), (1, 2, 33), (1, 3, 8)))


@pytest.mark.parametrize("impl", ["reference", "split"])
@pytest.mark.parametrize(("prefix", "own", "group"), GRID)
def test_the_grid(impl, prefix, own, group):
    lengths = [own, 1, own + 3]
    assert_right(make_problem(lengths, prefix=prefix, group=group), impl)
    for window in {1, max(1, prefix - 1), prefix + 1, prefix + own}:
        assert_right(make_problem(lengths, prefix=prefix, group=group, window=window), impl)


@pytest.mark.parametrize("impl", ["reference", "split"])
def test_in_float64_all_agree_to_rounding(impl):
    chain = [[], [(0, 4)], [(0, 2), (5, 3)], [(0, 5)]]
    problem = make_problem(
        [5, 3, 7, 1], prefix=[9, 9, 7, 9], ancestors=chain, group=3, sinks=True, softcap=2.0,
        window=6,
    )  # fmt: skip
    assert_right(problem.to(dtype=F64), impl, out=1e-14, lse=1e-14)


#: Rows of a coordinate search (each sees the parent, packed first, up to its own change) and of a
#: tree two levels deep.
CASES = {
    "parent": {
        "lengths": [9, 9, 6, 3, 1],
        "prefix": 20,
        "ancestors": [[], [], [(0, 3)], [(0, 6)], [(0, 8)]],
    },
    "tree": {
        "lengths": [12, 4, 2, 2, 5, 1, 1],
        "prefix": 11,
        "ancestors": [[], [(0, 12)], [(0, 12), (12, 4)], [(0, 12), (12, 3)], [(0, 7)],
                      [(0, 7), (20, 5)], [(0, 7), (20, 5)]],
    },
    "ancestors longer than a block": {
        # of the last two one joins the rest of its ancestor, and one reads on in the same tile
        "lengths": [90, 20, 28, 3, 20, 30],
        "prefix": 40,
        "ancestors": [[], [(0, 70)], [(0, 33), (90, 7)], [(0, 65), (90, 0)], [(0, 40)], [(0, 60)]],
    },
    "prefixes of different length": {"lengths": [3, 2, 4], "prefix": [5, 70, 33]},
    "many short rows": {"lengths": [1, 2] * 40, "prefix": 70},
    "no rows": {"lengths": []},
    "an empty row": {"lengths": [3, 0, 2], "prefix": 5},
    "one row longer than a tile": {"lengths": [150], "prefix": 3},
    "no prefix": {"lengths": [4, 1]},
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "grouped": {"group": 3},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"group": 4, "window": 9, "softcap": 3.0, "sinks": True, "scale": 0.7},
    "peaky": {"peak": 30.0},
}


@pytest.mark.parametrize("impl", ["reference", "split"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cases(impl, case, options):
    assert_right(make_problem(**case, **options), impl)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_on_cases(kernel_device, case, options):
    assert_right(make_problem(**case, **options).to(kernel_device), "triton")


@pytest.mark.parametrize(
    ("dim", "value_dim"), [(32, 32), (80, 80), (96, 96), (192, 128), (256, 256), (7, 5)]
)
def test_kernel_on_head_sizes(kernel_device, dim, value_dim):
    problem = make_problem([5, 3], prefix=40, group=2, dim=dim, value_dim=value_dim)
    assert_right(problem.to(kernel_device), "triton")


def test_kernel_on_a_grid(kernel_device):
    for prefix, own, group in itertools.product((0, 1, 31, 32, 33, 97), (1, 33), (1, 5)):
        problem = make_problem([own, own + 1], prefix=prefix, group=group)
        assert_right(problem.to(kernel_device), "triton")


def test_a_row_has_the_same_bits_whatever_it_is_packed_with(kernel_device):
    chain = [[], [], [(0, 3)], [(0, 3)], [(0, 8)]]
    lengths = [9, 40, 6, 35, 1]
    problem = make_problem(lengths, prefix=[50, 50, 50, 41, 50], ancestors=chain, group=3)
    problem = problem.to(kernel_device)
    out, lse = problem.run(shared_prefix_attention, impl="triton")
    q, k, v, shared_k, shared_v = problem.tensors
    table = problem.layout.rows.tolist()
    for row in (1, 2, 3, 4):
        q0, count, own, keys, start, prefix, low, length = table[row]
        packed = torch.cat([torch.arange(low, low + length), torch.arange(own, own + keys)])
        alone = PrefixLayout.build(
            [count], shared=(start, prefix), ancestors=[[(0, length)]], keys=[(length, keys)]
        )
        packed = packed.to(kernel_device)
        part = slice(q0, q0 + count)
        single = shared_prefix_attention(
            q[part], k[packed], v[packed], shared_k, shared_v, alone, impl="triton"
        )
        for found, expected in zip(single, (out[part], lse[part]), strict=True):
            if kernel_device == "cpu":
                # numpy's products round by the place of a row in the matrix
                torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
            else:
                assert_same_bits(found, expected)


@pytest.mark.parametrize("impl", ["reference", "split", "triton"])
def test_rows_whose_keys_lie_elsewhere(kernel_device, impl):
    """Decoding: one query to a row, own keys in slots of an arena."""
    problem = make_problem([30], prefix=12, group=2)
    q, k, v, shared_k, shared_v = problem.tensors
    layout = PrefixLayout.build([1, 2], shared=(0, 12), keys=[(3, 9), (20, 6)])
    q = q[:3]
    problem = type(problem)((q, k, v, shared_k, shared_v), layout)
    assert_right(problem.to(kernel_device if impl == "triton" else "cpu"), impl)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(data=st.data())
def test_random_trees(data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    starts = list(itertools.accumulate([0, *lengths]))
    ancestors = []
    for row in range(len(lengths)):
        chain = []
        for _ in range(data.draw(st.integers(0, 2))):
            other = data.draw(st.integers(0, row))
            if other < row:
                chain.append((starts[other], data.draw(st.integers(0, lengths[other]))))
        ancestors.append(chain)
    prefix = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    window = data.draw(st.one_of(st.none(), st.integers(1, 12)))
    problem = make_problem(
        lengths, prefix=prefix, ancestors=ancestors, window=window, dim=8,
        group=data.draw(st.sampled_from([1, 3])),
    )  # fmt: skip
    assert_right(problem, "split")
    assert_right(problem, "reference")


def test_split_without_fused_operators_and_in_small_blocks(monkeypatch):
    monkeypatch.setattr(dense, "_trusted", lambda *args: False)
    monkeypatch.setattr(dense, "BLOCK_ELEMENTS", 64)
    for case in CASES.values():
        for options in OPTIONS.values():
            assert_right(make_problem(**case, **options), "split")


def test_an_operator_that_is_wrong_is_not_trusted(monkeypatch):
    dense._trusted.cache_clear()
    right = dense._fused
    monkeypatch.setattr(dense, "_fused", lambda *args: (right(*args)[0], right(*args)[1] * 1.4427))
    with pytest.warns(RuntimeWarning, match="differs from plain arithmetic"):
        assert not dense._trusted("cpu", torch.float32, 16)
    dense._trusted.cache_clear()


# -- positions and layouts -----------------------------------------------------------------------


def test_positions_count_the_keys_before_a_query():
    layout = PrefixLayout.build(
        [3, 2, 1], shared=[(0, 4), (0, 4), (2, 1)], ancestors=[[], [(0, 2)], [(0, 3), (3, 2)]]
    )
    assert layout.position_ids().tolist() == [4, 5, 6, 6, 7, 6]
    decoding = PrefixLayout.build([1], shared=(0, 4), keys=[(7, 5)])
    assert decoding.position_ids().tolist() == [8]


def test_tiles_never_mix_ranges():
    layout = PrefixLayout.build(
        [5, 5, 5], shared=[(0, 4), (0, 2), (3, 1)], ancestors=[[], [(0, 0)], [(0, 2)]]
    )
    tables = layout.tables(torch.device("cpu"), 4, 32)
    assert tables.tiles[:, :2].tolist() == [[0, 4], [4, 8], [8, 10], [10, 14], [14, 15]]
    assert tables.lanes[:, 0].tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_the_rest_of_an_ancestor_joins_own_keys_that_need_no_more_blocks_for_it():
    """The 4 last keys of an ancestor of 20, before 8 own keys: in blocks of 16, not of 8."""
    layout = PrefixLayout.build([20, 8, 8], ancestors=[[], [(0, 20)], [(0, 20)]])
    small, large = (layout.tables(torch.device("cpu"), 64, block).blocks for block in (8, 16))
    # the ancestor, the first row, and the others
    assert small[:, 1].tolist() == [0, 8, 16, 0, 8, 16, 20, 28]
    assert not small[:, 6].any()
    assert large[:, 1].tolist() == [0, 0, 16, 20 - 4, 28 - 4]
    assert large[:, 2].tolist() == [16, 16, 4, 12, 12]
    assert large[:, 6:].tolist() == [[0, 0]] * 3 + [[4, 16]] * 2


def test_a_fixed_layout_takes_the_place_of_others(kernel_device):
    # a row of another range is a tile more than the second layout has
    chain = [[], [(0, 40)], [(5, 7)]]
    first = make_problem([60, 30, 9], prefix=70, ancestors=chain, group=3).to(kernel_device)
    chain = [[], [(0, 3)], [(0, 50)], [(0, 9)]]
    second = make_problem([60, 20, 18, 1], prefix=70, ancestors=chain, group=3).to(kernel_device)
    fixed = FixedLayout(first.layout.rows)
    expected = [p.run(shared_prefix_attention, impl="triton") for p in (first, second)]
    for _ in range(2):
        for problem, (out, lse) in zip((first, second), expected, strict=True):
            # the first time there is nothing to fill: the tables are made at the first launch
            assert fixed.take(problem.layout)
            found = shared_prefix_attention(*problem.tensors, fixed, impl="triton")
            assert_same_bits(found[0], out)
            assert_same_bits(found[1], lse)
    deeper = make_problem([60, 30, 9], ancestors=[[], [(0, 9)], [(0, 9), (60, 4)]])
    longer = make_problem([60, 30, 10], prefix=70, ancestors=chain[:3])
    many = make_problem([1] * 99, prefix=70, ancestors=[[(0, 1)]] * 99)
    for other in (deeper, longer, many):
        assert not fixed.take(other.layout)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lengths": [2, -1]}, "negative"),
        ({"lengths": [2], "shared": (0, -1)}, "negative"),
        ({"lengths": [2, 2], "shared": [(0, 1)]}, "each of 2 rows"),
        ({"lengths": [2], "ancestors": []}, "each of 1 rows"),
        ({"lengths": [2], "keys": [(0, 1)]}, "as many own keys as queries"),
        ({"lengths": [2**31]}, r"2\^31"),
    ],
)
def test_bad_layouts(arguments, match):
    with pytest.raises(ValueError, match=match):
        PrefixLayout.build(**arguments)


BAD = {
    "dtype": (lambda t: (t[0].int(), *t[1:]), {}, TypeError, "q: expected float32"),
    "queries": (lambda t: (t[0][1:], *t[1:]), {}, ValueError, "q: expected shape"),
    "dimension": (lambda t: (t[0], t[1][..., 1:], *t[2:]), {}, ValueError, "k: expected shape"),
    "heads": (
        lambda t: (t[0], *(x.repeat(1, 3, 1)[:, :3] for x in t[1:])), {}, ValueError,
        "multiple of 3 heads",
    ),
    "short": (lambda t: (t[0], t[1][:-1], t[2][:-1], *t[3:]), {}, ValueError, "at least the 7"),
    "prefix": (lambda t: (*t[:3], t[3][1:], t[4][1:]), {}, ValueError, "at least the 6"),
    "scale": (lambda t: t, {"scale": -1.0}, ValueError, "scale: expected a positive"),
    "window": (lambda t: t, {"window": 0}, ValueError, "window: expected a positive"),
    "softcap": (lambda t: t, {"softcap": -1.0}, ValueError, "softcap: expected a positive"),
    "sinks": (lambda t: t, {"sinks": torch.zeros(3)}, ValueError, "sinks: expected shape"),
    "graph": (
        lambda t: (t[0].clone().requires_grad_(), *t[1:]), {}, ValueError, "outside autograd",
    ),
    "impl": (lambda t: t, {"impl": "numba"}, Exception, "no such implementation"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input(change, options, error, match):
    problem = make_problem([3, 4], prefix=6)
    with pytest.raises(error, match=match):
        shared_prefix_attention(*change(problem.tensors), problem.layout, **options)


@pytest.mark.parametrize("impl", ["reference", "split", "triton"])
def test_strided_inputs(kernel_device, impl):
    problem = make_problem([3, 4], prefix=6, group=2).to(
        kernel_device if impl == "triton" else "cpu"
    )
    expected = problem.run(shared_prefix_attention, impl=impl)
    strided = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in problem.tensors)
    gaps = tuple(torch.stack([t, t.flip(2)], 3)[..., 0] for t in problem.tensors)
    for tensors in (strided, gaps):
        found = type(problem)(tensors, problem.layout).run(shared_prefix_attention, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "split", "triton"])
def test_op_checklist(kernel_device, impl):
    device = kernel_device if impl == "triton" else "cpu"

    def make_args(size):
        problem = make_problem(
            [size, 0, 1], prefix=size, ancestors=[[], [], [(0, size // 2)]], sinks=True
        ).to(device)
        tables = launch.tables(problem.layout, *problem.tensors[:3])
        options = (0.3, 7, 2.0, problem.options["sinks"], impl)
        return (*problem.tensors, *tables, problem.layout.rows.clone(), *options)

    check_op(op.prefix_attention, make_args, sizes=[13, 0, 1, 64, 67])


# -- merging -------------------------------------------------------------------------------------


def cut_problem(parts, dtype=F64, shift=0.0, sinks=None, scale=1.0):
    """Attention over keys cut in parts, and over all of them."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, 2, 8, generator=generator, dtype=F64) for n in (5, 40, 40))
    logits = torch.einsum("thd,nhd->thn", q, k) * scale
    bounds = [0, *sorted(parts), 40]
    outs, lses = [], []
    for low, high in itertools.pairwise(bounds):
        part = logits[..., low:high] + shift
        lses.append(part.logsumexp(-1).to(dtype))
        outs.append(torch.einsum("thn,nhd->thd", part.softmax(-1), v[low:high]).to(dtype))
    logits = logits + shift
    if sinks is not None:
        joined = torch.cat([logits, sinks[None, :, None].expand(5, 2, 1)], -1)
        weights = joined.softmax(-1)[..., :-1]
        whole = torch.einsum("thn,nhd->thd", weights, v)
        return outs, lses, whole, joined.logsumexp(-1)
    whole = torch.einsum("thn,nhd->thd", logits.softmax(-1), v)
    return outs, lses, whole, logits.logsumexp(-1)


@pytest.mark.parametrize("parts", [[], [1], [20], [39], [3, 17], [0, 9, 9, 30]])
def test_merge_is_one_softmax(parts):
    for shift in (0.0, 1e4, -1e4):
        outs, lses, out, lse = cut_problem(parts, shift=shift)
        for order in itertools.islice(itertools.permutations(range(len(outs))), 6):
            found = merge_attention_states([outs[i] for i in order], [lses[i] for i in order])
            torch.testing.assert_close(found[0], out, rtol=0, atol=1e-14 + abs(shift) * 1e-15)
            torch.testing.assert_close(found[1], lse, rtol=1e-14, atol=1e-14)


def test_merge_counts_sinks_once():
    sinks = torch.tensor([0.5, -2.0], dtype=F64)
    outs, lses, out, lse = cut_problem([11, 25], sinks=sinks)
    found = merge_attention_states(outs, lses, sinks=sinks)
    torch.testing.assert_close(found[0], out, rtol=0, atol=1e-14)
    torch.testing.assert_close(found[1], lse, rtol=1e-14, atol=1e-14)


def test_merge_of_huge_logits_has_no_nan(kernel_device):
    for impl, dtype in (("reference", F64), ("triton", torch.float32)):
        outs, lses, out, lse = cut_problem([7, 30], dtype, scale=1e4)
        device = kernel_device if impl == "triton" else "cpu"
        outs, lses = ([x.to(device) for x in states] for states in (outs, lses))
        found = merge_attention_states(outs, lses, impl=impl)
        torch.testing.assert_close(found[0].double().cpu(), out, rtol=0, atol=2e-2)
        torch.testing.assert_close(found[1].double().cpu(), lse, rtol=1e-6, atol=0)


def test_merge_ignores_what_an_empty_set_holds(kernel_device):
    outs, lses, out, lse = cut_problem([20], torch.float32)
    empty = torch.full_like(outs[0], float("nan"))
    nothing = torch.full_like(lses[0], float("-inf"))
    for impl, device in (("reference", "cpu"), ("triton", kernel_device)):
        states = [[x.to(device) for x in s] for s in ([empty, *outs], [nothing, *lses])]
        found, found_lse = merge_attention_states(*states, impl=impl)
        torch.testing.assert_close(found.double().cpu(), out, rtol=0, atol=1e-6)
        torch.testing.assert_close(found_lse.double().cpu(), lse, rtol=1e-6, atol=1e-6)
        alone, alone_lse = merge_attention_states([states[0][0]], [states[1][0]], impl=impl)
        assert not alone.any()
        assert bool((alone_lse == float("-inf")).all())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_merge_checklist(kernel_device, impl):
    device = kernel_device if impl == "triton" else "cpu"

    def make_args(size):
        generator = torch.Generator().manual_seed(size)
        outs = [torch.randn(size, 3, 5, generator=generator).to(device) for _ in range(3)]
        lses = [torch.randn(size, 3, generator=generator).to(device) for _ in range(3)]
        return outs, lses, torch.zeros(3, device=device), impl

    check_op(op.merge_states, make_args, sizes=[13, 0, 1, 64, 67])


@pytest.mark.parametrize(
    ("outs", "lses", "match"),
    [
        ([], [], "1 outputs"),
        ([torch.zeros(2, 3, 4)], [], "1 outputs"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)], [torch.zeros(2, 3)] * 2, "of the first"),
        ([torch.zeros(2, 3, 4)], [torch.zeros(3, 2)], "lses: expected shape"),
    ],
)
def test_bad_states(outs, lses, match):
    with pytest.raises(ValueError, match=match):
        merge_attention_states(outs, lses)
