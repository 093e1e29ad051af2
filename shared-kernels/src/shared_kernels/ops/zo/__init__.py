"""Zeroth-order perturbation and update of flat parameter buffers, with regenerated noise."""

from shared_kernels.ops.zo.api import zo_materialize, zo_replay
from shared_kernels.ops.zo.reference import join_bf16x2, split_bf16x2
from shared_kernels.ops.zo.tiles import TILE, Perturbation, Segment, build_tile_table

__all__ = [
    "TILE",
    "Perturbation",
    "Segment",
    "build_tile_table",
    "join_bf16x2",
    "split_bf16x2",
    "zo_materialize",
    "zo_replay",
]
