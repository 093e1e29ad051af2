"""Registration of the ChaCha20 op."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.random.chacha import reference
from shared_kernels.random.chacha.keys import key_words
from shared_kernels.random.op import signed_words


def _reference(out: Tensor, key: Tensor, n0: int, n1: int, n2: int, counter: int) -> None:
    counters = counter + torch.arange(out.shape[0], device=out.device)
    # int64 to int32 keeps the low 32 bits
    out.copy_(reference.chacha20_block(key_words(key), counters, (n0, n1, n2)))


def _numba(out: Tensor, key: Tensor, n0: int, n1: int, n2: int, counter: int) -> None:
    from shared_kernels.random.chacha import cpu

    cpu.chacha20_words_(out, key=key_words(key), nonce=(n0, n1, n2), counter=counter)


def _triton(out: Tensor, key: Tensor, n0: int, n1: int, n2: int, counter: int) -> None:
    from shared_kernels.random.chacha import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.words_kernel
    blocks, per_program = out.shape[0], 256
    with torch.cuda.device_of(out):
        kernel[(-(-blocks // per_program),)](
            out,
            blocks,
            *(signed_words(word)[0] for word in (counter, n0, n1, n2)),
            *key.tolist(),
            BLOCK=per_program,
            num_warps=4,
        )


def _fake(*args: Any) -> None:
    return None


chacha20_words_ = declare(
    "chacha20_words_(Tensor(a!) out, Tensor key, SymInt n0, SymInt n1, SymInt n2, SymInt counter)"
    " -> ()",
    implementations={"reference": _reference, "numba": _numba, "triton": _triton},
    fake=_fake,
)
