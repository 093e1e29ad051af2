"""Compile every launch of the decoding kernels for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.prefix_attention.decode import launch

SHAPES = [
    (torch.bfloat16, 2, 128, 128, {}),
    (torch.bfloat16, 8, 256, 256, {"softcap": 50.0, "window": 64}),
    (torch.float16, 1, 192, 128, {"sinks": torch.zeros(2)}),
    (torch.float32, 3, 64, 64, {"window": 9}),
]

if __name__ == "__main__":
    with compiling() as seen:
        for dtype, group, dim, value_dim, options in SHAPES:
            q = torch.empty(5, 2 * group, dim, dtype=dtype)
            k, v = (torch.empty(5 * 700, 2, size, dtype=dtype) for size in (dim, value_dim))
            table = torch.zeros(5, dtype=torch.int64)
            launch.decode_attention(
                q, k, v, k[:900], v[:900], table, table, table, table,
                torch.zeros(2, 6, dtype=torch.int64), 700, launch.tile_of(2 * group, 2), 900, 0.1,
                options.get("window"), options.get("softcap"), options.get("sinks"),
            )  # fmt: skip
        print(json.dumps(sorted(seen)))
