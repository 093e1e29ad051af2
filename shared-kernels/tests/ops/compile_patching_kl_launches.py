"""Compile every launch of the divergences for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.patching.kl import launch

if __name__ == "__main__":
    with compiling() as seen:
        for rows, examples, width, vocabulary in ((64, 64, 576, 1024), (3, 5, 67, 131)):
            for dtype in (torch.float32, torch.bfloat16):
                delta, law = torch.ones(rows, examples, width), torch.ones(examples, vocabulary)
                weight = torch.ones(vocabulary, width, dtype=dtype)
                launch.kl_from_delta(delta, weight, law, torch.ones(examples, width), 1.0)
    print(json.dumps(sorted(seen)))
