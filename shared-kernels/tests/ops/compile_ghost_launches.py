"""Compile every launch of the ghost kernels for Hopper, in each configuration."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.dp import wide
from shared_kernels.ops.ghost import launch


def each_configuration(op, kind, configs, run):
    for config in configs[1:]:
        run(config)
    return configs[0]


def launch_all(samples, tokens, i, o, dtype, masked):
    x, d = torch.ones(samples, tokens, i, dtype=dtype), torch.ones(samples, tokens, o, dtype=dtype)
    y, u = torch.ones(2, o, i, dtype=dtype), torch.ones(2, o, 24, dtype=dtype)
    v = torch.ones(2, i, 24, dtype=dtype)
    mask = torch.ones(tokens, samples, dtype=torch.bool).T if masked else None
    weights = torch.ones(samples, tokens) if masked else None
    launch.ghost_dot(x, d, y, mask)
    launch.ghost_dot_low_rank(x, d, u, v, mask)
    launch.pairwise_ghost(x, d, x, d, mask, mask, "gram")
    launch._cov(x, torch.zeros(i, i), mask, weights)
    launch._project(x, -5, 1, 40, mask)


if __name__ == "__main__":
    wide.capability = lambda device: (9, 0)
    with compiling() as seen:
        launch.choose = each_configuration
        launch_all(2, 600, 576, 1536, torch.bfloat16, False)
        launch.choose = lambda op, kind, configs, run: configs[0]
        launch_all(2, 600, 576, 1536, torch.float32, False)
        launch_all(300, 1, 64, 64, torch.bfloat16, False)
        launch_all(1, 1, 1, 1, torch.float32, False)
        # odd sizes with a mask and weights
        launch_all(3, 7, 33, 65, torch.float16, True)
        launch_all(3, 7, 33, 65, torch.float32, True)
    print(json.dumps(sorted(seen)))
