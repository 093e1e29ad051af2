"""Public functions: divergences of laws from a base law."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels._checks import check_tensor
from shared_kernels.ops.patching.kl import op, reference

_FLOATS = (torch.float32, torch.float64)
_WEIGHTS = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16),
}


def mean_weight(weight: Tensor, law: Tensor) -> Tensor:
    """Average the rows of a head under laws: ``law @ weight``, summed in float64, never TF32.

    Args:
        weight: float32, bfloat16 or float64 ``(V, D)``.
        law: float32 or float64 ``(N, V)``, probabilities.

    Returns:
        ``(N, D)`` of the law's dtype.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, or a tensor of an autograd graph.
    """
    check_tensor("weight", weight, dtypes=_WEIGHTS[torch.float64], shape=(None, None))
    shape = (None, weight.shape[0])
    check_tensor("law", law, dtypes=_FLOATS, shape=shape, device=weight.device)
    return reference.mean_weight(weight, law)


def kl_from_delta(
    delta: Tensor,
    weight: Tensor,
    law: Tensor,
    mean: Tensor,
    *,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Return the divergence ``KL(p || q)`` in nats of laws from the difference of their states.

    The logits of q are those of p plus ``scale * delta . weight_v``. Nothing cancels: errors are
    below 1e-9 + 1e-5 KL, ``KL(p || p)`` is 0, and what all logits have in common does not count.
    The logits are never written. Products are of 22 bits, not of TF32's 11, sums are float32 and
    of parts float64; they repeat bit for bit, and on a GPU those of a row (m, n) do not depend on
    the number of rows. ``2 M N V D`` FLOPs, three times that on tensor cores; up to half a GB of
    workspace holds the head as pairs of float16.

    Args:
        delta: float32 or float64 ``(M, N, D)``, differences of M rows of what the head multiplies.
        weight: ``(V, D)`` of the head, of delta's dtype, or bfloat16.
        law: ``(N, V)`` of delta's dtype, the probabilities p.
        mean: ``(N, D)`` of delta's dtype, `mean_weight` of the two.
        scale: Of the logits.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``(M, N)`` of delta's dtype.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, or a tensor of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("delta", delta, dtypes=_FLOATS, shape=(None, None, None), strided=True)
    (_, examples, width), dtype, device = delta.shape, delta.dtype, delta.device
    check_tensor("weight", weight, dtypes=_WEIGHTS[dtype], shape=(None, width), device=device)
    shape = (examples, weight.shape[0])
    check_tensor("law", law, dtypes=(dtype,), shape=shape, device=device)
    check_tensor("mean", mean, dtypes=(dtype,), shape=(examples, width), device=device)
    delta = delta if delta.stride(-1) == 1 else delta.contiguous()
    return op.kl_from_delta(delta, weight, law, mean, float(scale), impl)
