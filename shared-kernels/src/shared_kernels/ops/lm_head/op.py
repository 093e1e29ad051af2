"""Registration of the head's op."""

from typing import Any

from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.lm_head import launch, reference, split


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return reference.empty_results(hidden, targets, args[-1])


linear_logprob = declare(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor rows, Tensor? bias,"
    " float scale, float? softcap, bool entropy, SymInt top_k)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "reference": reference.linear_logprob,
        "triton": launch.linear_logprob,
    },
    fake=_fake,
    unsupported=launch.unsupported,
)


def _fake_entropy(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate_dtype(hidden.dtype)
    make = hidden.new_empty
    return make(hidden.shape[0], dtype=dtype), make(hidden.shape[0], dtype=dtype)


linear_entropy = declare(
    "linear_entropy(Tensor hidden, Tensor weight, Tensor? bias, float scale, float? softcap)"
    " -> (Tensor, Tensor)",
    implementations={
        "reference": reference.linear_entropy,
        "triton": launch.linear_entropy,
        "split": split.linear_entropy,
    },
    fake=_fake_entropy,
    unsupported=launch.unsupported,
)
