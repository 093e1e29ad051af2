"""Compile every launch of the rows' attention for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.patching.attention import launch

if __name__ == "__main__":
    with compiling() as seen:
        for tokens, width, wide, rows in (
            (14, 64, 64, 4),
            (14, 128, 128, 1),
            (16, 256, 256, 4),
            (30, 64, 64, 1),
            (300, 64, 64, 4),
            (300, 128, 128, 4),
            (300, 256, 256, 4),
            (70, 24, 40, 4),
        ):
            for window, softcap, causal, dtype in (
                (None, None, True, torch.float32), (8, 50.0, True, torch.bfloat16),
                (None, None, False, torch.float32),
            ):  # fmt: skip
                q, k = torch.ones(2, 2, rows, 3, tokens, width)
                v = torch.ones(2, 1, 3, tokens, wide)
                base, kv = torch.ones(2, 3, tokens, wide), torch.zeros(2, dtype=torch.int64)
                rest = (0.1, window, softcap, causal, dtype)
                launch.suffix_attention(q, k, v, base, kv, None, *rest)
                at = torch.zeros(3, dtype=torch.int64)
                one = (x[:, :, :, :1] for x in (q, base[:, None]))
                q, base = (x.contiguous() for x in one)
                launch.suffix_attention(q, k, v, base[:, 0], kv, at, *rest)
    print(json.dumps(sorted(seen)))
