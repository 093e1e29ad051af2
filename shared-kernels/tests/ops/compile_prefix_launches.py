"""Compile the launches of prefix attention for Hopper, and print the kernels' names."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.prefix_attention import launch
from shared_kernels.testing.prefixes import make_problem

SHAPES = [
    (torch.bfloat16, 4, 128, 128, {}),
    (torch.bfloat16, 4, 256, 256, {"softcap": 50.0, "window": 64}),
    (torch.float16, 1, 192, 128, {"sinks": True}),
    (torch.float32, 3, 64, 64, {"window": 9}),
]

if __name__ == "__main__":
    launch.choose = lambda op, kind, configs, run: configs[0]
    with compiling() as seen:
        for dtype, group, dim, value_dim, options in SHAPES:
            problem = make_problem(
                [5, 3, 2], prefix=70, ancestors=[[], [(0, 2)], [(0, 5)]], group=group, dim=dim,
                value_dim=value_dim, **options,
            ).to(dtype=dtype)  # fmt: skip
            tables = problem.layout.tables(
                torch.device("cpu"), *launch.tiling(*problem.tensors[:3])
            )
            more = (options.get("window"), options.get("softcap"), problem.options.get("sinks"))
            out, lse = launch.prefix_attention(
                *problem.tensors, *tables, problem.layout.rows, 0.1, *more
            )
            launch.merge_states([out, out, out], [lse, lse, lse], problem.options.get("sinks"))
        print(json.dumps(sorted(seen)))
