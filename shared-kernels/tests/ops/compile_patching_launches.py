"""Compile every launch of the patching steps for Hopper: see test_compile.py."""

import itertools
import json

import torch
from compiling import compiling
from shared_kernels.ops.patching import launch

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


def norms(width, kind, dtype, kept, narrow):
    x, weight = torch.empty(2, 3, width), torch.empty(width) if kind == "rms" else None
    at = torch.empty(3, dtype=torch.int64) if narrow else None
    senders = torch.empty(2, 4, 3, width, dtype=kept)
    index = torch.empty(3, dtype=torch.int32)
    launch.combine_norm(x, senders, senders, index, index, at, weight, kind, 1e-6, dtype)
    picked, drop = index.long(), torch.empty(3, dtype=torch.bool)
    start = None if narrow else x[0]
    launch.prefix_norm(x[0], x, picked, drop, start, at, weight, kind, 1e-6, dtype)


if __name__ == "__main__":
    with compiling() as seen:
        for case in itertools.product((576, 4096), ("rms", "layer", "none"), (F32, FP8)):
            norms(*case, BF16, case[0] == 576)
        norms(100, "rms", BF16, F32, False)
        norms(launch.MOST_WIDTH, "layer", FP8, F32, True)
        for act, dtype in itertools.product(("silu", "gelu", "gelu_tanh", "relu"), (BF16, FP8)):
            for inputs, gated in ((1536, False), (8192, True), (28672, False)):
                moved = torch.empty(2, 3, inputs, dtype=BF16)
                launch.activation_delta(moved, torch.empty(3, inputs), act, gated, dtype)
    print(json.dumps(sorted(seen)))
