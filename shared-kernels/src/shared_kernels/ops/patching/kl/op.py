"""Registration of the divergence."""

from typing import Any

from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.patching.kl import launch, reference


def _fake(delta: Tensor, *args: Any) -> Tensor:
    return delta.new_empty(delta.shape[:2])


kl_from_delta = declare(
    "kl_from_delta(Tensor delta, Tensor weight, Tensor law, Tensor mean, float scale) -> Tensor",
    implementations={"reference": reference.kl_from_delta, "triton": launch.kl_from_delta},
    fake=_fake,
    unsupported=launch.unsupported,
)
