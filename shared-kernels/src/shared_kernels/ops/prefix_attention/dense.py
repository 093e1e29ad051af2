"""Attention without a mask, or causal, that also returns its log-sum-exp.

PyTorch's fused kernels compute the log-sum-exp and hand it out only through operators that are not
public. Each is used after it has agreed with plain arithmetic once in this process; where it is
missing, or differs, plain arithmetic in blocks does the work.
"""

import functools
import math
import warnings

import torch
from torch import Tensor

#: Logits held at a time by plain arithmetic.
BLOCK_ELEMENTS = 1 << 24


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attend in each of B problems.

    Args:
        q: ``(B, H, M, D)``.
        k: ``(B, H, N, D)``, N at least 1.
        v: ``(B, H, N, Dv)``.
        scale: Of the inner products.
        causal: Query i sees keys up to i; then M = N.

    Returns:
        Output ``(B, H, M, Dv)`` and natural log-sum-exp ``(B, H, M)``, float32 (float64 for
        float64).
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # parts that are merged later must not be rounded to 16 bits first
        q, k, v = q.float(), k.float(), v.float()
    if v.shape[-1] == k.shape[-1] and _trusted(q.device.type, q.dtype, q.shape[-1]):
        out, lse = _fused(q, k, v, scale, causal)
        return out.to(lse.dtype), lse
    return _plain(q, k, v, scale, causal)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = k.to(dtype).mT, v.to(dtype)
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    rows = max(1, BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    index = torch.arange(k.shape[2], device=q.device)
    for low in range(0, q.shape[2], rows):
        part = slice(low, low + rows)
        logits = (q[:, :, part].to(dtype) @ keys) * scale
        if causal:
            logits.masked_fill_(index > index[part, None], float("-inf"))
        lse[:, :, part] = total = logits.logsumexp(-1)
        out[:, :, part] = (logits - total[..., None]).exp_() @ values
    return out, lse


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, causal, scale=scale)
    elif q.element_size() == 2:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q, k, v, 0.0, causal, scale=scale)[:2]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = efficient(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    # some kernels pad the log-sum-exps to whole blocks
    return out, lse[..., : q.shape[2]]


@functools.cache
def _trusted(device: str, dtype: torch.dtype, dim: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, rows, dim, generator=generator).to(device, dtype) for rows in (37, 37, 37)
    )
    k = k[:, :, :29] if device == "cpu" else k
    bound = {2: 2e-2, 4: 1e-4, 8: 1e-10}[dtype.itemsize]
    for causal in (False, True):
        keys, values = (k, v[:, :, : k.shape[2]]) if not causal else (q, v)
        expected = _plain(q, keys, values, 1 / math.sqrt(dim), causal)
        try:
            found = _fused(q, keys, values, 1 / math.sqrt(dim), causal)
        except (AttributeError, RuntimeError, TypeError) as error:
            return _distrust(f"raised {error!r}")
        for a, b in zip(found, expected, strict=True):
            if a.shape != b.shape or not torch.allclose(a.to(b.dtype), b, atol=bound, rtol=bound):
                return _distrust("differs from plain arithmetic")
    return True


def _distrust(reason: str) -> bool:
    warnings.warn(
        f"torch's fused attention {reason}; prefix attention takes slower, plain arithmetic",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
