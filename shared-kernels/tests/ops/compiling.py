"""Compile launches for Hopper on a machine without a GPU, in a process of their own."""

import contextlib

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {
    **DTYPES, torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
    torch.uint8: "u8",
}  # fmt: skip
#: Of one program on Hopper.
SHARED_MEMORY = 227 * 1024
seen = set()


def type_of(value):
    if isinstance(value, tuple):
        return tuple(type_of(part) for part in value)
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
        if str(types[name]).startswith("*") or (types[name] == "i32" and given[name] % 16 == 0)
    }
    source = ASTSource(kernel, {n: types[n] for n in params}, constexprs=fixed, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= SHARED_MEMORY, f"{made.metadata.shared} bytes of shared memory"
    seen.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")


@contextlib.contextmanager
def compiling():
    """Compile what is launched in this context, and collect the kernels' names."""
    triton.JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: compile_launch(kernel, args, options)
    )
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    yield seen
