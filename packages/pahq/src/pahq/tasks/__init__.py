"""Pairs of inputs on which a model does something and does not do it."""

from pahq.tasks.base import Task, from_pairs
from pahq.tasks.ioi import ioi

__all__ = ["Task", "from_pairs", "ioi"]
