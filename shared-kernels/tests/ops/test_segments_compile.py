"""The kernels of segment sums compile for Hopper, on a machine without a GPU: see test_compile.py.

This file is its own script: a process of its own compiles, without the interpreter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_kernels.ops import segments
from shared_kernels.ops.segments import launch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_every_kernel_compiles_for_hopper():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    source = (Path(segments.__file__).parent / "triton.py").read_text()
    kernels = {f"triton.{name}" for name in re.findall(r"^def (\w+_kernel)", source, re.M)}
    assert set(json.loads(done.stdout)) == kernels


def launch_all():
    f64 = {"dtype": torch.float64}
    for dtype, rows, width, masked in (
        (torch.bfloat16, 70000, 2048, False), (torch.bfloat16, 300, 7168, True),
        (torch.float32, 5000, 771, True), (torch.float64, 5000, 512, False),
    ):  # fmt: skip
        x = torch.empty(rows, width, dtype=dtype)
        counts = torch.zeros(128, dtype=torch.int64)
        keep = torch.ones(rows, dtype=torch.bool) if masked else None
        sums, columns = torch.empty(128, width, **f64), torch.empty(128, 6, **f64)
        launch.segment_sums_(x, counts, keep, sums, "sum")
        launch.segment_sums_(x, None, keep, sums[:1], "square")
        launch.norm_sums_(x, x.bfloat16(), keep, sums[0], sums[1])
        launch.assignment_sums_(
            x, x[:, 0].contiguous(), torch.empty(rows, **f64), counts, keep, sums, columns
        )


if __name__ == "__main__":
    import compiling

    compiling.POINTERS[torch.float64] = "fp64"
    with compiling.compiling() as seen:
        launch_all()
    print(json.dumps(sorted(seen)))
