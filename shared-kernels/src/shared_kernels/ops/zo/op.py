"""Registration of the zeroth-order op."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_kernels._autotune import choose
from shared_kernels._library import declare
from shared_kernels.ops.zo import reference
from shared_kernels.random.op import signed_words

#: Launch configurations, the default first: groups of 1024 elements per program, warps, and
#: whether Philox multiplies 32 x 32 -> 64 bits at once.
CONFIGS = tuple(
    {"GROUPS": groups, "num_warps": warps, "WIDE": wide}
    for groups, warps, wide in ((2, 4, 1), (4, 4, 1), (4, 4, 0), (4, 8, 1), (2, 2, 1), (1, 1, 1))
)


def _numba(*args: Any) -> None:
    from shared_kernels.ops.zo import cpu

    cpu.zo_materialize(*args)


def _triton(
    master: Tensor,
    lo: Tensor | None,
    tiles: Tensor,
    keys: Tensor,
    coefs: Tensor,
    plus: Tensor | None,
    minus: Tensor | None,
    perturb: bool,
    seed: int,
    direction: int,
    eps: float,
    fold: bool,
    stochastic: bool,
    dither_seed: int,
    dist: str,
) -> None:
    from shared_kernels.ops.zo import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.zo_kernel

    def launch(config: Mapping[str, int], master: Tensor, lo: Tensor | None) -> None:
        kernel[(tiles.shape[0] * 4 // config["GROUPS"],)](
            master,
            lo,
            tiles,
            keys,
            coefs,
            plus,
            minus,
            keys.shape[0],
            *signed_words(seed),
            direction,
            eps,
            *signed_words(dither_seed),
            GAUSSIAN=dist == "gaussian",
            PERTURB=perturb,
            FOLD=fold,
            STOCHASTIC=fold and stochastic,
            enable_fp_fusion=False,
            **config,
        )

    def trial(config: Mapping[str, int]) -> None:
        # a fold changes the master, so candidates are timed on a copy
        if fold:
            launch(config, master.clone(), lo if lo is None else lo.clone())
        else:
            launch(config, master, lo)

    with torch.cuda.device_of(master):
        kind = f"{dist}-{str(master.dtype).removeprefix('torch.')}-{min(keys.shape[0], 2)}"
        launch(choose("zo_materialize", kind, CONFIGS, trial), master, lo)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _unsupported(master: Tensor, *args: Any) -> str | None:
    outputs = (master, *(arg for arg in args if isinstance(arg, Tensor)))
    if any(t.dtype == torch.bfloat16 for t in outputs):
        capability = _capability(master.device)
        if capability < (8, 0):
            return f"bfloat16 needs compute capability 8.0, this GPU has {capability}"
    return None


def _fake(*args: Any) -> None:
    return None


zo_materialize_ = declare(
    "zo_materialize_(Tensor(a!) master, Tensor(b!)? lo, Tensor tiles, Tensor keys, Tensor coefs,"
    " Tensor(c!)? plus, Tensor(d!)? minus, bool perturb, SymInt seed, SymInt direction, float eps,"
    " bool fold, bool stochastic, SymInt dither_seed, str dist) -> ()",
    implementations={"reference": reference.zo_materialize, "numba": _numba, "triton": _triton},
    fake=_fake,
    unsupported=_unsupported,
)
