"""The ops on privacy units under the checklist, compiled, and with bad arguments."""

import pytest
import torch
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops import dp
from shared_kernels.ops.dp import op
from shared_kernels.testing import assert_same_bits, check_op
from shared_kernels.testing.segments import UnitRows, make_units

F64 = torch.float64


def op_arguments(case: UnitRows, impl: str) -> dict:
    a, g, cu, tokens, scale = case
    out, bias_out = case.outputs("transposed")
    table = torch.zeros(6, g.shape[1], device=g.device)
    threshold = torch.full((), 2.0, device=g.device)
    clip = ("abadi", 0.01, None, len(g), False, True)
    return {
        "gram_norm": (op.gram_norm, (a, g, cu, True, None, impl)),
        "token_gram_norm": (op.token_gram_norm, (tokens, g, cu, 1, None, impl)),
        "mm_norm": (op.mm_norm, (a, g, cu, True, 1, impl)),
        "scaled_mm": (op.scaled_mm_, (a, g, cu, scale, out, bias_out, 1, impl)),
        "mm_clip": (op.mm_clip_, (a, g, cu, threshold, out, bias_out, *clip, impl)),
        "mm_clip over": (
            op.mm_clip_,
            (a, g, cu, threshold, out, bias_out, *clip[:-1], False, impl),
        ),
        "gram_clip": (
            op.gram_clip_,
            (a, g, cu, threshold, out, bias_out, "abadi", 0.01, len(g), 1, impl),
        ),
        "sums": (op.sums, (a, None, cu, impl)),
        "product_sums": (op.sums, (g, g.clone(), cu, impl)),
        "clip_factors": (op.clip_factors, (scale, threshold, "abadi", 0.01, impl)),
        "certified_norm": (op.certified_norm, (scale - 0.5, scale, cu, 5, 7, impl)),
        "embedding": (op.embedding_accumulate_, (tokens, g, cu, scale, table, None, impl)),
    }


@pytest.mark.parametrize("name", sorted(op_arguments(make_units([], 1, 1), "auto")))
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_op_checklist(kernel_device, impl, name):
    device = kernel_device if impl == "triton" else "cpu"

    def make_args(rows):
        lengths = [rows // 3, 0, rows - rows // 3]
        return op_arguments(make_units(lengths, 5, 7).on(device), impl)[name][1]

    checked, _ = op_arguments(make_units([3], 5, 7), impl)[name]
    check_op(checked, make_args, sizes=[13, 0, 1, 64, 67])


def test_public_functions_compile_into_one_graph():
    def step(a, g, cu, out):
        n2, absolute = dp.segment_gram_norm(a, g, cu)
        bound = dp.gram_error_bound(absolute, cu, a.shape[1], g.shape[1])
        scale = dp.clip_factors(n2 + bound, 1.0)
        dp.segment_scaled_mm(a, g, cu, scale, out)
        return n2, dp.segment_mm_clip(a, g, cu, 1.0, out), dp.segment_sums(g, cu)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 6], [7, 1, 2]):
        case = make_units(lengths, 4, 3)
        eager, graph = case.outputs()[0], case.outputs()[0]
        expected = step(case.a, case.g, case.cu, eager)
        for x, y in zip(compiled(case.a, case.g, case.cu, graph), expected, strict=True):
            assert_same_bits(x, y)
        assert_same_bits(graph, eager)


def bad(call):
    case = make_units([3, 4], 5, 2)
    return lambda: call(*case, *case.outputs())


BAD = {
    "a dtype": (
        bad(lambda a, g, cu, *_: dp.segment_mm_norm(a.int(), g, cu)),
        TypeError,
        r"a: expected float32 or bfloat16 or float16 or float64, got int32 \(7, 5\)",
    ),
    "g dtype": (
        bad(lambda a, g, cu, *_: dp.segment_gram_norm(a, g.half(), cu)),
        TypeError,
        r"g: expected float32, got float16 \(7, 2\) on cpu; convert it",
    ),
    "rows": (
        bad(lambda a, g, cu, *_: dp.segment_gram_norm(a, g[1:], cu)),
        ValueError,
        r"g: expected shape \(7, any\), got float32 \(6, 2\)",
    ),
    "autograd": (
        bad(lambda a, g, cu, *_: dp.segment_mm_norm(a.requires_grad_(), g, cu)),
        ValueError,
        "a: expected a tensor outside autograd.*detach",
    ),
    "cu dtype": (
        bad(lambda a, g, cu, *_: dp.segment_sums(g, cu.long())),
        TypeError,
        r"cu_seqlens: expected int32, got int64 \(3,\)",
    ),
    "cu empty": (
        bad(lambda a, g, cu, *_: dp.segment_sums(g, cu[:0])),
        ValueError,
        "cu_seqlens: expected at least the boundary 0",
    ),
    "cu values": (
        bad(lambda a, g, cu, *_: dp.segment_mm_norm(a, g, cu + 1)),
        ValueError,
        r"cu_seqlens: expected 0 first, the number of rows \(7\) last.*got \[1, 4, 8\]",
    ),
    "cu order": (
        bad(lambda a, g, cu, *_: dp.segment_sums(g, torch.tensor([0, 5, 3, 7]).int())),
        ValueError,
        "cu_seqlens: .*no decrease between",
    ),
    "cu values in a product": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_scaled_mm(a, g, cu - 1, s, out)),
        ValueError,
        "cu_seqlens: expected 0 first",
    ),
    "tokens": (
        bad(lambda a, g, cu, t, *_: dp.segment_token_gram_norm(t[:-1], g, cu)),
        ValueError,
        r"tokens: expected shape \(7,\), got int64 \(6,\)",
    ),
    "scale": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_scaled_mm(a, g, cu, s[:1], out)),
        ValueError,
        r"scale: expected shape \(2,\), got float32 \(1,\)",
    ),
    "scale dtype": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_scaled_mm(a, g, cu, s.half(), out)),
        TypeError,
        "scale: expected float32, got float16",
    ),
    "out shape": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_scaled_mm(a, g, cu, s, out.T)),
        ValueError,
        r"out: expected shape \(2, 5\), got float32 \(5, 2\)",
    ),
    "out dtype": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_mm_clip(a, g, cu, 1.0, out.half())),
        TypeError,
        "out: expected float32, got float16",
    ),
    "out expanded": (
        bad(
            lambda a, g, cu, t, s, out, _: dp.segment_mm_clip(
                a, g, cu, 1.0, torch.zeros(1, 5).expand(2, 5)
            )
        ),
        ValueError,
        r"out: expected no expanded dimension, got .*strides \(0, 1\)",
    ),
    "bias": (
        bad(lambda a, g, cu, t, s, out, b: dp.segment_scaled_mm(a, g, cu, s, out, bias_out=b[:1])),
        ValueError,
        r"bias_out: expected shape \(2,\), got float32 \(1,\)",
    ),
    "threshold": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_mm_clip(a, g, cu, 0.0, out)),
        ValueError,
        "threshold: expected a positive number, got float 0.0",
    ),
    "automatic": (
        bad(lambda a, g, cu, t, s, *_: dp.clip_factors(s, float("inf"), "automatic")),
        ValueError,
        "threshold: expected a finite number with automatic clipping",
    ),
    "threshold dtype": (
        bad(lambda a, g, cu, t, s, *_: dp.clip_factors(s, torch.ones((), dtype=F64))),
        TypeError,
        r"threshold: expected float32, got float64 \(\)",
    ),
    "clipping": (
        bad(lambda a, g, cu, t, s, *_: dp.clip_factors(s, 1.0, "flat")),
        ValueError,
        "clipping: expected one of abadi, automatic",
    ),
    "stability": (
        bad(lambda a, g, cu, t, s, *_: dp.clip_factors(s, 1.0, "automatic", 0.0)),
        ValueError,
        "stability: expected a positive number",
    ),
    "chunk": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_mm_clip(a, g, cu, 1.0, out, chunk=0)),
        ValueError,
        "chunk: expected an integer in",
    ),
    "equal": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_mm_clip(a, g, cu, 1.0, out, equal=True)),
        ValueError,
        "equal: expected rows divisible by 2 units",
    ),
    "max_seqlen": (
        bad(lambda a, g, cu, *_: dp.segment_gram_norm(a, g, cu, max_seqlen=-1)),
        ValueError,
        "max_seqlen: expected a length or None",
    ),
    "no length": (
        bad(lambda a, g, cu, t, s, out, _: dp.segment_mm_clip(a, g, cu, 1.0, out, impl="triton")),
        ValueError,
        "max_seqlen: expected a length where units are not equal, got NoneType",
    ),
    "float64 kernel": (
        bad(lambda a, g, cu, *_: dp.segment_mm_norm(a.double(), g.double(), cu, impl="triton")),
        KernelUnavailableError,
        "float64 has no kernel",
    ),
    "product": (
        bad(lambda a, g, cu, *_: dp.segment_product_sums(a, g, cu)),
        ValueError,
        r"g: expected shape \(7, 5\), got float32 \(7, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, message = BAD[case]
    if "triton" in message or case in ("no length", "float64 kernel"):
        pytest.importorskip("triton")
    with pytest.raises(error, match=message):
        call()
