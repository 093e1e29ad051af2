"""Public functions of the zeroth-order family."""

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, check_tensor, message
from shared_kernels.ops.zo import op
from shared_kernels.ops.zo.tiles import TILE, Perturbation, check_perturbation
from shared_kernels.random.api import DISTRIBUTIONS, as_int64

ROUNDINGS = ("nearest", "stochastic")
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    master: Tensor,
    lo: Tensor | None,
    tiles: Tensor,
    keys: Tensor,
    coefs: Tensor,
    rounding: str,
    fold: bool,
    dist: str,
) -> None:
    check_choice("dist", dist, DISTRIBUTIONS)
    check_choice("rounding", rounding, ROUNDINGS)
    check_tensor("master", master, dtypes=(torch.float32, torch.bfloat16), shape=(None,))
    device, numel = master.device, master.shape[0]
    check_tensor("tiles", tiles, dtypes=(torch.int32,), shape=(None, 5), device=device)
    if numel != tiles.shape[0] * TILE:
        raise ValueError(
            message(
                "master",
                f"{tiles.shape[0]} tiles x {TILE} = {tiles.shape[0] * TILE} elements",
                master,
                "pad each segment to whole tiles and build the table from the same segments",
            )
        )
    check_tensor("keys", keys, dtypes=(torch.int32,), shape=(None, 3), device=device)
    check_tensor("coefs", coefs, dtypes=(torch.float32,), shape=(keys.shape[0], 2), device=device)
    if lo is not None:
        check_tensor("lo", lo, dtypes=(torch.int16,), shape=(numel,), device=device)
        if master.dtype != torch.bfloat16:
            raise TypeError(
                message("master", "bfloat16 beside lo (a bf16x2 pair)", master, "drop lo")
            )
    if rounding == "stochastic" and fold and (master.dtype != torch.bfloat16 or lo is not None):
        raise ValueError(
            message(
                "rounding",
                "'nearest', because only a bfloat16 master without lo is rounded",
                rounding,
                "leave rounding at its default",
            )
        )


def zo_materialize(
    master: Tensor,
    tiles: Tensor,
    keys: Tensor,
    coefs: Tensor,
    *,
    perturb: Perturbation | None,
    plus: Tensor | None = None,
    minus: Tensor | None = None,
    fold: bool = False,
    rounding: str = "nearest",
    dither_seed: int = 0,
    dist: str = "gaussian",
    lo: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Replay pending updates on a flat buffer and write its perturbed copies.

    In float32, each operation rounded on its own: ``y = master``; for each record in order
    ``y = a y - b z_k`` (``a = 1`` where a tile does not decay); then ``plus = y + eps z`` and
    ``minus = y - eps z`` rounded to nearest even in their own dtypes, or ``plus = y`` without
    ``perturb``. With ``fold`` the master becomes ``y``. ``z`` is drawn once for both outputs.
    Padding elements of the master stay as they are and are written as 0 to the outputs.

    Deterministic, and bit-equal between implementations and devices. Reads the master and writes
    each output once: 2 + 2 + 2 bytes per element for bfloat16, and ``records + 1`` draws.

    Args:
        master: float32 or bfloat16 ``(tiles * 4096,)``; written only with ``fold``.
        tiles: int32 ``(tiles, 5)`` from `build_tile_table`.
        keys: int32 ``(records, 3)``: low and high bits of the step seed, direction.
        coefs: float32 ``(records, 2)``: ``a`` and ``b``.
        perturb: Direction and scale, or None for no perturbation.
        plus: float32, bfloat16 or float16 ``(tiles * 4096,)``, written; None skips it.
        minus: As ``plus``; needs ``perturb``.
        fold: Write the replayed values back to the master.
        rounding: How ``fold`` rounds to a bfloat16 master: ``nearest`` or ``stochastic``.
        dither_seed: Seed of the stochastic rounding.
        dist: ``gaussian`` or ``rademacher``.
        lo: int16 ``(tiles * 4096,)``, low halves of a bf16x2 master (exact float32).
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.

    Raises:
        TypeError: A tensor has another dtype than listed.
        ValueError: Shapes, devices, layouts or options do not fit together.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    _check(master, lo, tiles, keys, coefs, rounding, fold, dist)
    for name, out in (("plus", plus), ("minus", minus)):
        if out is not None:
            check_tensor(name, out, dtypes=_OUT_DTYPES, shape=master.shape, device=master.device)
    if perturb is None:
        if minus is not None:
            raise ValueError(
                message("minus", "None without perturb", minus, "ask for plus, or pass perturb")
            )
        perturb_args = (False, 0, 0, 0.0)
    else:
        check_perturbation(perturb)
        perturb_args = (True, as_int64(perturb.seed), perturb.direction, float(perturb.eps))
    if master.shape[0] == 0 or (plus is None and minus is None and not fold):
        return
    op.zo_materialize_(
        master,
        lo,
        tiles,
        keys,
        coefs,
        plus,
        minus,
        *perturb_args,
        fold,
        rounding == "stochastic",
        as_int64(dither_seed),
        dist,
        impl,
    )


def zo_replay(
    master: Tensor,
    tiles: Tensor,
    keys: Tensor,
    coefs: Tensor,
    *,
    lo: Tensor | None = None,
    dist: str = "gaussian",
    rounding: str = "nearest",
    dither_seed: int = 0,
    impl: str = "auto",
) -> None:
    """Apply any number of update records to a flat buffer in place.

    The same as `zo_materialize` with ``fold`` and no outputs: one read and one write of the buffer
    whatever the number of records, which may be thousands.

    Args:
        master: float32 or bfloat16 ``(tiles * 4096,)``, updated.
        tiles: int32 ``(tiles, 5)`` from `build_tile_table`.
        keys: int32 ``(records, 3)``: low and high bits of the step seed, direction.
        coefs: float32 ``(records, 2)``: ``a`` and ``b``.
        lo: int16 ``(tiles * 4096,)``, low halves of a bf16x2 master, updated.
        dist: ``gaussian`` or ``rademacher``.
        rounding: How to round to a bfloat16 master: ``nearest`` or ``stochastic``.
        dither_seed: Seed of the stochastic rounding.
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.
    """
    zo_materialize(
        master,
        tiles,
        keys,
        coefs,
        perturb=None,
        fold=True,
        rounding=rounding,
        dither_seed=dither_seed,
        dist=dist,
        lo=lo,
        impl=impl,
    )
