"""Compile every launch of the skinny products for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.skinny import launch

if __name__ == "__main__":
    with compiling() as seen:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for rows, sizes in (
                (8, (100,)),
                (32, (64, 64)),
                (64, (2048, 1024, 1024)),
                (5, (9,) * 4),
                (32, (4096, 4096)),
                (64, (4096, 4096)),
            ):
                x = torch.empty(rows, 256, dtype=dtype)
                weights = [torch.empty(n, 256, dtype=dtype) for n in sizes]
                for biases in ([], [w[:, 0].contiguous() for w in weights]):
                    launch.skinny_linears(x, weights, biases)
    print(json.dumps(sorted(seen)))
