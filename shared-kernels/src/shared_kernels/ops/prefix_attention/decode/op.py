"""Registration of the decoding op."""

from typing import Any

from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.prefix_attention.decode import launch, reference
from shared_kernels.ops.prefix_attention.reference import accumulate_dtype


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[0], q.shape[1], dtype=accumulate_dtype(q.dtype))
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), lse


def _numba(*args: Any) -> Any:
    from shared_kernels.ops.prefix_attention.decode import cpu

    return cpu.decode_attention(*args)


decode_attention = declare(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor shared_k, Tensor shared_v,"
    " Tensor lengths, Tensor starts, Tensor prefix_lengths, Tensor order, Tensor tiles,"
    " SymInt capacity, int tile, SymInt longest, float scale, int? window, float? softcap,"
    " Tensor? sinks) -> (Tensor, Tensor)",
    implementations={
        "reference": reference.decode_attention,
        "numba": _numba,
        "triton": launch.decode_attention,
    },
    fake=_fake,
    unsupported=launch.unsupported,
)
