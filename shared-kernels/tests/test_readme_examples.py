import re
from pathlib import Path

import pytest
import shared_kernels
from shared_kernels.bench import Ceilings, Plan, run_workload

README = Path(shared_kernels.__file__).parents[2] / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the checkout")


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_noise_example():
    [code] = [block for block in blocks() if "param_uid" in block]
    exec(code, {})


def test_the_benchmark_example():
    [code] = [block for block in blocks() if "@benchmark" in block]
    namespace = {}
    exec(code.replace("1 << 24", "1 << 12"), namespace)
    ceilings = Ceilings("cpu")
    ceilings._measured["device_copy"] = 1e9
    [workload] = namespace["scale"]("cpu")
    result = run_workload(workload, ceilings, Plan(warmup=1, min_rounds=1, max_rounds=1))
    assert [arm["name"] for arm in result["arms"]] == ["two steps", "one step"]


def test_no_example_is_left_out():
    assert len(blocks()) == 2
