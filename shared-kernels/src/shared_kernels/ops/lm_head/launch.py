"""The streaming core: a block of logits by the matrix library, one pass over it by a kernel."""

from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.lm_head import reference
from shared_kernels.ops.lm_head.reference import empty_results, finish

#: Rows and elements of a block of logits: large enough for the matrix library, 128 MB in float32.
ROWS: Final = 2048
ELEMENTS: Final = 1 << 25
#: A block has a multiple of this many columns, as the kernel takes them, so that sums have one
#: order whatever the number of rows.
STEP: Final = 4096


def unsupported(hidden: Tensor, *args: Any) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    return "float64 has no kernel" if hidden.dtype == torch.float64 else None


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Multiply into float32 without rounding the sums to 16 bits."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().T, out=out)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    entropy: bool,
    top_k: int,
) -> tuple[Tensor, ...]:
    """Compute what `reference.linear_logprob` defines, block by block of rows and of the head."""
    if (reason := unsupported(hidden)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.lm_head import triton as kernels

    results = empty_results(hidden, targets, top_k)
    logprob, lse, argmax, entropies, top_values, top_indices = results
    count, vocabulary = hidden.shape[0], weight.shape[0]
    # a target outside the vocabulary is never picked
    logprob.fill_(float("nan"))
    argmax.zero_()
    top_values.fill_(float("-inf"))
    peak = torch.full_like(lse, float("-inf"))
    total, moment = torch.zeros_like(lse), torch.zeros_like(lse)
    # a row's targets, one after the other
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    # few rows take few launches
    columns = max(STEP, ELEMENTS // max(1, min(ROWS, count)) // STEP * STEP)
    block = hidden.new_empty(min(ROWS, count) * min(columns, vocabulary), dtype=torch.float32)
    # launch options are not part of the function's signature
    kernel: Any = kernels.logits_kernel
    with torch.cuda.device_of(hidden):
        for low in range(0, count, ROWS):
            part = slice(low, min(count, low + ROWS))
            for first in range(0, vocabulary, columns):
                width = min(columns, vocabulary - first)
                logits = block[: (part.stop - low) * width].view(-1, width)
                seen = slice(first, first + width)
                _product(hidden[part], weight[seen], logits)
                kernel[(len(logits),)](
                    logits,
                    bias,
                    targets,
                    order,
                    starts,
                    logprob,
                    peak,
                    argmax,
                    total,
                    moment,
                    low,
                    width,
                    first,
                    width,
                    scale,
                    0.0 if softcap is None else softcap,
                    SOFTCAP=softcap is not None,
                    ENTROPY=entropy,
                    BLOCK=1024 if interpreting() else 4096,
                    num_warps=8,
                )
                if top_k:
                    part_bias = None if bias is None else bias[seen]
                    logits = finish(logits, part_bias, scale, softcap)
                    values, indices = logits.topk(min(top_k, width))
                    values = torch.cat([top_values[part], values], 1)
                    indices = torch.cat([top_indices[part], indices + first], 1)
                    top_values[part], chosen = values.topk(top_k)
                    top_indices[part] = indices.gather(1, chosen)
    torch.add(peak, total.log(), out=lse)
    logprob -= lse[rows]
    top_values -= lse[:, None]
    if entropy:
        torch.sub(total.log(), moment / total, out=entropies)
    return results


#: Rows, tokens and width of a tile of the fused kernel, its stages and warps, and the programs
#: that make a device busy.
TILE: Final = (128, 256, 64)
STAGES: Final = 3
WARPS: Final = 8
#: A part of the head has as many tiles as these at least.
FEWEST_TILES: Final = 4


def _splits(rows: int, tiles: int, processors: int) -> int:
    """Return into how many parts the head is cut: as many as fill the processors evenly."""
    most = max(1, min(tiles // FEWEST_TILES, 4 * processors))
    waves = [(-(-rows * n // processors) / n, n) for n in range(1, most + 1)]
    best = min(cost for cost, _ in waves)
    return next(n for cost, n in waves if cost <= 1.02 * best)


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.linear_entropy` defines.

    One kernel multiplies 16-bit states and keeps three sums of each row; float32 ones, whose
    products it could not make at the matrix library's speed, go through blocks of logits.
    """
    if (reason := unsupported(hidden)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    if hidden.dtype == torch.float32 and not interpreting():
        none = torch.empty(0, dtype=torch.int64, device=hidden.device)
        found = linear_logprob(hidden, weight, none, none, bias, scale, softcap, True, 0)
        return found[3], found[1]
    from shared_kernels.ops.lm_head import triton as kernels

    count, width = hidden.shape
    vocabulary = weight.shape[0]
    if not count:
        empty = hidden.new_empty(0, dtype=torch.float32)
        return empty, empty.clone()
    # rows in one piece: the kernel reads along them
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    m, n, k = (16, 32, 16) if interpreting() else TILE
    if not interpreting() and count <= 64:
        m = 64
    blocks, tiles = -(-count // m), -(-vocabulary // n)
    processors = (
        torch.cuda.get_device_properties(hidden.device).multi_processor_count
        if hidden.is_cuda else 2
    )  # fmt: skip
    splits = _splits(blocks, tiles, processors)
    state = hidden.new_empty(splits, 3, count, dtype=torch.float32)
    kernel: Any = kernels.entropy_kernel
    with torch.cuda.device_of(hidden):
        kernel[(blocks, splits)](
            hidden,
            weight,
            bias,
            state,
            count,
            vocabulary,
            width,
            -(-tiles // splits),
            hidden.stride(0),
            weight.stride(0),
            scale,
            0.0 if softcap is None else softcap,
            SOFTCAP=softcap is not None,
            EVEN=width % k == 0,
            M=m,
            N=n,
            K=k,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return reference.merge_entropy(*state.unbind(1))
