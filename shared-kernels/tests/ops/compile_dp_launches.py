"""Compile every launch of the segment kernels for Hopper, and print the kernels' names."""

import contextlib
import json

import torch
import triton
from shared_kernels.ops.dp import launch, wide
from shared_kernels.testing.segments import make_units
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {**DTYPES, torch.int32: "i32", torch.int64: "i64"}
seen = set()


def type_of(value):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{POINTERS[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(kernel, args, options):
    params = {p.name: p.is_constexpr for p in kernel.params}
    given = dict(zip(params, args, strict=False))
    given |= {name: options.pop(name) for name in list(options) if name in params}
    fixed = {
        name: value
        for name, value in given.items()
        if params[name] or value is None or (isinstance(value, int) and value == 1)
    }
    types = {n: "constexpr" if n in fixed else type_of(v) for n, v in given.items()}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(params)
        if types[name].startswith("*") or (types[name] == "i32" and given[name] % 16 == 0)
    }
    source = ASTSource(kernel, {n: types[n] for n in params}, constexprs=fixed, attrs=aligned)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    seen.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")


def over_descriptors(count, clipping):
    case = make_units([64] * count, 264, 136, torch.bfloat16)
    out, bias = case.outputs()
    threshold = torch.tensor(1.0)
    launch.gram_clip(case.a, case.g, case.cu, threshold, out, None, clipping, 0.01, 64, 64)
    launch.scaled_mm(case.a, case.g, case.cu, case.scale, out, None, 64)
    launch.mm_norm(case.a, case.g, case.cu, False, 64)
    launch.token_gram_norm(case.tokens, case.g, case.cu, 2, None)
    launch.mm_clip(
        case.a, case.g, case.cu, threshold, out, bias, clipping, 0.01, None, None, True, False
    )


def any_layout(dtype):
    case = make_units([17] * 3, 33, 65, dtype)
    out, bias = case.outputs()
    threshold = torch.tensor(1.0)
    launch._products = lambda x, y: torch.zeros(len(x), *out.shape)
    launch.choose = lambda op, kind, configs, run: configs[0]
    launch.gram_clip(case.a, case.g, case.cu, threshold, out, bias, "abadi", 0.01, 17, 1)
    launch.token_gram_norm(case.tokens, case.g, case.cu, 2, None)
    launch.mm_norm(case.a, case.g, case.cu, True, 1)
    launch.mm_clip(
        case.a, case.g, case.cu, threshold, out, bias, "abadi", 0.01, 1, None, True, True
    )
    launch.sums(case.g, case.g, case.cu)
    table = torch.zeros(6, 65)
    launch.embedding_accumulate(case.tokens, case.g, case.cu, case.scale, table, None)


if __name__ == "__main__":
    triton.JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: compile_launch(kernel, args, options)
    )
    wide.capability = lambda device: (9, 0)
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    for count in (1, 3, 40):
        for clipping in ("abadi", "automatic"):
            over_descriptors(count, clipping)
    for dtype in (torch.bfloat16, torch.float32):
        any_layout(dtype)
    print(json.dumps(sorted(seen)))
