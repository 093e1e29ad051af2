"""Registration of the sampling ops."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.sampling import launch, reference


def _fake_sample(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = reference.accumulate_dtype(logits.dtype), logits.shape[0]
    logprob, kept, entropy = (logits.new_empty(rows, dtype=dtype) for _ in range(3))
    return logits.new_empty(rows, dtype=torch.int64), logprob, kept, entropy


def _numba_sample(*args: Any) -> Any:
    from shared_kernels.ops.sampling import cpu

    return cpu.gumbel_sample(*args)


gumbel_sample = declare(
    "gumbel_sample(Tensor logits, Tensor keys, Tensor index, Tensor? threshold, float temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    implementations={
        "reference": reference.gumbel_sample,
        "numba": _numba_sample,
        "triton": launch.gumbel_sample,
    },
    fake=_fake_sample,
    unsupported=launch.unsupported,
)

slot_refill_ = declare(
    "slot_refill_(Tensor(a!) slots, Tensor(b!) rows, Tensor queue, Tensor(c!) counters,"
    " Tensor(d!) order, Tensor(e!) tiles, Tensor(f!) tokens, Tensor(g!) logprobs, Tensor token,"
    " Tensor logprob, Tensor eos, int places, int tile, bool record) -> ()",
    implementations={"reference": reference.slot_refill_, "triton": launch.slot_refill_},
    fake=lambda *args: None,
    unsupported=launch.refill_unsupported,
)
