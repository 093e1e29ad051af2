"""Modules of multi-token prediction: what transformers leaves aside when it loads a model."""

from slimmoe.mtp.acceptance import acceptance_rate
from slimmoe.mtp.modeling_mtp import MTPHead

__all__ = ["MTPHead", "acceptance_rate"]
