"""Registration of the patching ops."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import declare
from shared_kernels.ops.patching import launch, reference


def _fake_combine(x: Tensor, wide: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return launch.outputs(x, (x.shape[0], wide.shape[1], *x.shape[1:]), args[-1])


def _fake_prefix(
    x: Tensor, differences: Tensor, picked: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return launch.outputs(x, (picked.shape[0], *x.shape), args[-1])


def _fake_activation(
    moved: Tensor, base: Tensor, act: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows, tokens, inputs = moved.shape
    return launch.outputs(moved, (rows, tokens, inputs // 2 if gated else inputs), dtype)


combine_norm = declare(
    "patching_combine_norm(Tensor x, Tensor wide, Tensor narrow, Tensor offsets, Tensor entries,"
    " Tensor? at, Tensor? weight, str kind, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    implementations={"reference": reference.combine_norm, "triton": launch.combine_norm},
    fake=_fake_combine,
    unsupported=launch.norm_unsupported,
)

prefix_norm = declare(
    "patching_prefix_norm(Tensor x, Tensor differences, Tensor picked, Tensor drop, Tensor? start,"
    " Tensor? at, Tensor? weight, str kind, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    implementations={"reference": reference.prefix_norm, "triton": launch.prefix_norm},
    fake=_fake_prefix,
    unsupported=launch.norm_unsupported,
)

activation_delta = declare(
    "patching_activation_delta(Tensor moved, Tensor base, str act, bool gated, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    implementations={"reference": reference.activation_delta, "triton": launch.activation_delta},
    fake=_fake_activation,
    unsupported=launch.activation_unsupported,
)
