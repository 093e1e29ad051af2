"""Perturbed runs of a transformer as differences from a base run."""

from shared_kernels.ops.patching.api import (
    Rounded,
    activation_delta,
    combine_norm,
    delta_linear,
    prefix_norm,
    quantize_rows,
)

__all__ = [
    "Rounded",
    "activation_delta",
    "combine_norm",
    "delta_linear",
    "prefix_norm",
    "quantize_rows",
]
