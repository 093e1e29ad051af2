"""Distillation of a linear head, whose logits exist for a chunk of rows only."""

from shared_kernels.ops.distill.api import (
    Distillation,
    HeadsDistillation,
    TeacherSample,
    fused_linear_distillation,
    fused_linear_distillation_heads,
    sample_teacher,
    sparse_distillation,
)

__all__ = [
    "Distillation",
    "HeadsDistillation",
    "TeacherSample",
    "fused_linear_distillation",
    "fused_linear_distillation_heads",
    "sample_teacher",
    "sparse_distillation",
]
