"""What to do with a predicted length: which answers to make together, and which first."""

from forelen.schedule.batching import LengthAwareBatchSampler, padding_ratio, plan_batches
from forelen.schedule.order import plan_order
from forelen.schedule.priority import gittins_index, priority
from forelen.schedule.sampling import SampledLengths
from forelen.schedule.simulator import Outcome, Trace, simulate
from forelen.schedule.transformers_cb import (
    LengthTable,
    check_live,
    generate_batch,
    register_transformers_schedulers,
    scheduled,
)

__all__ = [
    "LengthAwareBatchSampler",
    "LengthTable",
    "Outcome",
    "SampledLengths",
    "Trace",
    "check_live",
    "generate_batch",
    "gittins_index",
    "padding_ratio",
    "plan_batches",
    "plan_order",
    "priority",
    "register_transformers_schedulers",
    "scheduled",
    "simulate",
]
