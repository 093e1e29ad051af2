"""Choose the launch configuration of a kernel among a few fixed ones.

``SHARED_KERNELS_AUTOTUNE`` decides how: ``off`` takes the first configuration, ``table`` (default)
the one that ``tuned/<gpu>.json`` lists for this GPU, else the first, and ``full`` times all of them
on the first call of each kind. Configurations never change results.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Final

import torch

from shared_kernels._checks import check_choice
from shared_kernels._library import interpreting

Config = Mapping[str, int]

MODES: Final = ("off", "table", "full")
#: A kernel may offer at most this many configurations.
MAX_CONFIGS: Final = 12
_measured: dict[tuple[str, str, str], Config] = {}


def table_name(gpu: str) -> str:
    """Return the file name of a GPU's table, for instance ``NVIDIA_H200.json``."""
    return "".join(c if c.isalnum() else "_" for c in gpu) + ".json"


@functools.cache
def load_table(gpu: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return the table of a GPU as ``{op: {kind of call: configuration}}``, empty if none ships."""
    path = resources.files("shared_kernels") / "tuned" / table_name(gpu)
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def choose(
    op: str, kind: str, configs: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """Choose the configuration of one launch on the current CUDA device.

    Args:
        op: Name of the op.
        kind: Coarse description of the call; a choice is made once per kind.
        configs: The candidates, the safe default first.
        run: Launches one candidate; must not change what the caller's tensors hold, because
            ``full`` calls it many times.

    Returns:
        One of ``configs``, or an entry of the GPU's table.

    Raises:
        ValueError: Unknown word in ``SHARED_KERNELS_AUTOTUNE``, or too many candidates.
    """
    if len(configs) > MAX_CONFIGS:
        raise ValueError(f"{op}: expected at most {MAX_CONFIGS} configurations, got {len(configs)}")
    mode = os.environ.get("SHARED_KERNELS_AUTOTUNE", "table")
    check_choice("SHARED_KERNELS_AUTOTUNE", mode, MODES)
    if interpreting() or mode == "off":
        return configs[0]
    gpu = _gpu_name(torch.cuda.current_device())
    if mode == "table":
        return load_table(gpu).get(op, {}).get(kind, configs[0])
    if (op, kind, gpu) not in _measured:
        from triton.testing import do_bench

        _measured[op, kind, gpu] = min(
            configs, key=lambda config: do_bench(lambda: run(config), warmup=10, rep=50)
        )
    return _measured[op, kind, gpu]
