"""Compile every launch of the kernels of segment sums for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.segments import launch

if __name__ == "__main__":
    with compiling() as seen:
        counts = torch.tensor([3, 0, 4])
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for width in (2048, 33):
                x, sums = torch.ones(7, width, dtype=dtype), torch.zeros(3, width).double()
                one = sums[:1]
                for keep in (None, torch.ones(7, dtype=torch.bool)):
                    for kind in ("sum", "abs", "square"):
                        launch.segment_sums_(x, counts, keep, sums, kind)
                        launch.segment_sums_(x, None, keep, one, kind)
                    launch.norm_sums_(x, x, keep, one[0], one[0])
                    columns, share = torch.zeros(3, 6).double(), torch.ones(7).double()
                    launch.assignment_sums_(x, x[:, 0], share, counts, keep, sums, columns)
    print(json.dumps(sorted(seen)))
