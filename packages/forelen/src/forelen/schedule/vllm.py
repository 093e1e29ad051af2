"""Priorities for vLLM's ``--scheduling-policy priority``, whose lowest number goes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from shared_kernels._checks import message

from forelen.schedule.priority import priority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forelen.distribution import LengthDistribution


def generate(
    llm: Any,
    prompts: Sequence[Any],
    found: LengthDistribution,
    sampling_params: Any = None,
    *,
    objective: str = "latency",
    aging: float = 20.0,
    order: Sequence[int] | None = None,
    **options: Any,
) -> list[Any]:
    """Answer prompts with ``LLM.generate(..., priority=...)``.

    A priority is sent once and holds while a request waits. Predictions come from a model that
    transformers runs, the same one or a smaller one.

    Args:
        llm: ``vllm.LLM(..., scheduling_policy="priority")``.
        prompts: As vLLM takes them.
        found: The predicted length of each answer.
        sampling_params: Of vLLM.
        objective: ``latency``: shortest first; ``makespan``: longest first, which helps with
            lengths that are known; with predicted ones give an ``order``.
        aging: Tokens that a second of waiting makes up for.
        order: As `forelen.schedule.plan_order` returns it, instead of an objective.
        **options: Of ``LLM.generate``.

    Raises:
        ValueError: The engine ignores priorities, there is not one prediction for each prompt,
            or the order is none.
    """
    if len(prompts) != len(found):
        remedy = "predict each prompt once"
        raise ValueError(message("found", f"{len(prompts)} rows", len(found), remedy))
    engine = getattr(llm, "llm_engine", None)
    config = getattr(getattr(engine, "vllm_config", None), "scheduler_config", None)
    policy = getattr(config, "policy", None)
    if policy != "priority":
        remedy = 'make it by LLM(..., scheduling_policy="priority")'
        raise ValueError(message("llm", "an engine that schedules by priority", policy, remedy))
    if order is None:
        arrival = np.zeros(len(prompts))
        values = priority(found, arrival, aging=aging, objective=objective).tolist()
    elif sorted(order) == list(range(len(prompts))):
        values = np.argsort(order).tolist()
    else:
        remedy = "take that of plan_order(found, slots)"
        raise ValueError(message("order", f"rows 0 to {len(prompts) - 1}", order, remedy))
    return llm.generate(prompts, sampling_params, priority=values, **options)
