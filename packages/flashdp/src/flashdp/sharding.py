"""Parameters of which each rank holds a part: FSDP2, `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "empty_sum",
    "first_element",
    "is_sharded",
    "like_parameter",
    "reduce_scatter",
    "trouble",
    "unsharded_type",
]


def is_sharded(param: Any) -> bool:
    """Whether a parameter is a `DTensor`."""
    # Who has one has imported its module; importing it costs everybody else half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def unsharded_type(module: nn.Module) -> type[nn.Module]:
    """Return a module's class without what `fully_shard` mixes into it."""
    found = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        found = next(c for c in found.__mro__ if not issubclass(c, fsdp.FSDPModule))
    return found


def trouble(param: Any) -> str | None:
    """Say why a sharded parameter cannot be trained privately; None if it can."""
    split = [p for p in param.placements if not p.is_replicate()]
    if param.device.type != param.device_mesh.device_type:
        return (
            f"it lies on the {param.device.type} and is used on {param.device_mesh.device_type} "
            "(CPUOffloadPolicy): sums are kept where layers compute"
        )
    if len(split) == 1 and split[0].is_shard(0):
        return None
    return (
        f"it is placed as {tuple(param.placements)}, and only one split along the first dimension, "
        "which is what fully_shard makes, is supported"
    )


def reduce_scatter(total: Tensor, param: Any) -> Tensor:
    """Add up all ranks' sums of a parameter; return this rank's part.

    Args:
        total: This rank's sum for the whole parameter, of the parameter's shape.
        param: The sharded parameter.
    """
    from torch.distributed.tensor import DTensor, Partial

    mesh = param.device_mesh
    whole = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=param.placements).to_local().contiguous()


def empty_sum(param: Any) -> Tensor:
    """Return zeros of the shape of what this rank holds, float32 or wider."""
    mine = param.to_local() if is_sharded(param) else param
    return torch.zeros_like(mine, dtype=torch.promote_types(mine.dtype, torch.float32))


def first_element(param: Any) -> int:
    """Index in the whole parameter, in row-major order, of this rank's first element."""
    (dim,) = (k for k, p in enumerate(param.placements) if p.is_shard())
    ranks, rank = param.device_mesh.size(dim), param.device_mesh.get_local_rank(dim)
    rows = len(param)
    return min(rank * -(-rows // ranks), rows) * (param.numel() // max(rows, 1))


def like_parameter(local: Tensor, param: Any) -> Any:
    """Return a gradient for a sharded parameter from this rank's part of it."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
