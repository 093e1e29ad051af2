"""The kernels compile for Hopper, on a machine without a GPU.

The interpreter runs what no compiler pass has seen: a kernel can be right there and not compile.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shared_kernels.ops import (
    distill,
    dp,
    ghost,
    patching,
    prefix_attention,
    sampling,
    segments,
    skinny,
)
from shared_kernels.ops.patching import attention as patching_attention
from shared_kernels.ops.patching import kl as patching_kl
from shared_kernels.ops.prefix_attention import decode

FAMILIES = {
    "decode": decode, "distill": distill, "dp": dp, "ghost": ghost, "patching": patching,
    "patching_attention": patching_attention, "patching_kl": patching_kl,
    "prefix": prefix_attention, "sampling": sampling, "segments": segments, "skinny": skinny,
}  # fmt: skip


def kernels(folder):
    """Names of the kernels in the sources, by their files."""
    for file in (path.stem for path in folder.glob("triton*.py")):
        for name in re.findall(r"^def (\w+_kernel)", (folder / f"{file}.py").read_text(), re.M):
            yield f"{file}.{name}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_for_hopper(family):
    script = Path(__file__).with_name(f"compile_{family}_launches.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout)) == set(kernels(Path(FAMILIES[family].__file__).parent))
