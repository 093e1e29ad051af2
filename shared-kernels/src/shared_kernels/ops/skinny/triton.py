"""Few rows times several matrices: one program for 64 outputs of one of them."""

import triton
import triton.language as tl


@triton.jit
def linears_kernel(
    x, y, w0, w1, w2, w3, b0, b1, b2, b3, n0, n1, n2, n3, m, k, x_row, y_row,
    COUNT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``y[:, first : first + n] = x w^T + b`` for a block of outputs."""
    block = tl.program_id(0)
    w, b, n, first = w0, b0, n0, 0
    if COUNT > 1 and block >= tl.cdiv(n, BLOCK_N):
        block -= tl.cdiv(n, BLOCK_N)
        w, b, first, n = w1, b1, first + n, n1
        if COUNT > 2 and block >= tl.cdiv(n, BLOCK_N):
            block -= tl.cdiv(n, BLOCK_N)
            w, b, first, n = w2, b2, first + n, n2
            if COUNT > 3 and block >= tl.cdiv(n, BLOCK_N):
                block -= tl.cdiv(n, BLOCK_N)
                w, b, first, n = w3, b3, first + n, n3
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    weights = w + outputs[:, None].to(tl.int64) * k + inner[None, :]
    inputs = x + rows[None, :] * x_row + inner[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k, BLOCK_K):
        there = start + inner < k
        # the matrix goes through the cache once, the rows stay in it
        part = tl.load(
            weights, mask=(outputs < n)[:, None] & there[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        row = tl.load(inputs, mask=(rows < m)[None, :] & there[:, None], other=0.0)
        total = tl.dot(part, row, total, input_precision=PRECISION)
        weights += BLOCK_K
        inputs += BLOCK_K
    if BIAS:
        total += tl.load(b + outputs, mask=outputs < n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + rows[None, :] * y_row + first + outputs[:, None],
        total.to(y.dtype.element_ty),
        mask=(outputs < n)[:, None] & (rows < m)[None, :],
    )
