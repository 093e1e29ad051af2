"""Distillation of a teacher into a smaller student, in a Trainer of transformers."""

from slimmoe.distillation.arguments import DistillationArguments
from slimmoe.distillation.logit_cache import TeacherLogitCache
from slimmoe.distillation.teacher import Teacher
from slimmoe.distillation.trainer import DistillationTrainer

__all__ = ["DistillationArguments", "DistillationTrainer", "Teacher", "TeacherLogitCache"]
