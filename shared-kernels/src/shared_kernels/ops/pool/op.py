"""Registration of the pooling ops."""

from typing import Any

from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.pool import launch, reference


def _fake_sums(
    hidden: Tensor, score: Tensor, cu_seqlens: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    count, dtype = cu_seqlens.shape[0] - 1, reference.accumulate_dtype(hidden.dtype)
    shapes = ((count,), (count,), (count, hidden.shape[1]))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_output(inner: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, *args: Any) -> Tensor:
    dtype = reference.accumulate_dtype(inner.dtype)
    return inner.new_empty(inner.shape[0], weight.shape[0], dtype=dtype)


softmax_segment_sums = declare(
    "softmax_segment_sums(Tensor hidden, Tensor score, Tensor cu_seqlens, Tensor mask)"
    " -> (Tensor, Tensor, Tensor)",
    implementations={"reference": reference.segment_sums, "triton": launch.segment_sums},
    fake=_fake_sums,
    unsupported=launch.unsupported,
)

plp_update_ = declare(
    "plp_update_(Tensor(a!) peak, Tensor(b!) total, Tensor(c!) weighted, Tensor hidden,"
    " Tensor score, Tensor numbers, Tensor active, Tensor(d!) features) -> ()",
    implementations={"reference": reference.plp_update_, "triton": launch.plp_update_},
    fake=lambda *args: None,
    unsupported=launch.update_unsupported,
)

plp_output = declare(
    "plp_output(Tensor inner, Tensor gain, Tensor shift, Tensor weight, Tensor bias, float eps)"
    " -> Tensor",
    implementations={"reference": reference.plp_output, "triton": launch.plp_output},
    fake=_fake_output,
    unsupported=launch.unsupported,
)
