"""Registration of the op."""

from typing import Any

from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.skinny import launch, reference


def _fake(x: Tensor, weights: list[Tensor], *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


skinny_linears = declare(
    "skinny_linears(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
    implementations={
        "reference": reference.skinny_linears,
        "triton": launch.skinny_linears,
    },
    fake=_fake,
    unsupported=launch.unsupported,
)
