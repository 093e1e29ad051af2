"""Compile every launch of the distillation kernels for Hopper: see test_compile.py."""

import json

import torch
from compiling import compiling
from shared_kernels.ops.distill import launch

if __name__ == "__main__":
    with compiling() as seen:
        for vocabulary in (151936, 131):
            student, teacher = torch.ones(3, vocabulary), torch.ones(2, vocabulary)
            rows, weights = torch.zeros(3, dtype=torch.int64), torch.ones(3)
            indices, log_probs = torch.zeros(3, 64, dtype=torch.int32), torch.ones(3, 64)
            for slope in (None, student, student.bfloat16(), student.half()):
                for temperature in (1.0, 2.0):
                    launch.distillation_rows(
                        student, slope, teacher, rows, rows, weights, weights, temperature, -100,
                        torch.ones(3, 4),
                    )  # fmt: skip
                    for tail in (True, False):
                        launch.sparse_rows(
                            student, slope, indices, log_probs, rows, weights, weights, temperature,
                            -100, tail, torch.ones(3, 4),
                        )  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            launch.scaled(torch.ones(3, 5), torch.ones(()), dtype)
        launch.scaled(torch.ones(3, 5).double(), torch.ones(()).double(), torch.float64)
    print(json.dumps(sorted(seen)))
