"""How well a model does a task, before anything is looked for in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range

from pahq.metrics import best_logit, log_prob, mean_logit, on_device, prob

if TYPE_CHECKING:
    from pahq.tasks.base import Task


@torch.no_grad()
def baseline(
    model: Any, task: Task, *, min_accuracy: float | None = None, batch: int = 16
) -> dict[str, float]:
    """Run a model on the clean prompts of a task, and refuse one that it does not do.

    Logits are made where answers are given only, for one batch at a time.

    Args:
        model: A causal language model of transformers. It runs in evaluation mode.
        task: Pairs; the corrupted prompts are not run.
        min_accuracy: Share of the examples in which an answer must be more probable than all wrong
            ones (``pairwise``; ``top1`` in a task without wrong ones); None takes what there is.
        batch: Prompts of a run.

    Returns:
        Means over the examples: ``top1``, how often the most probable token is an answer; ``nll``,
        minus the log-probability of the answers in nats. With wrong answers also ``pairwise``, how
        often the most probable of answers and wrong answers is an answer; ``logit_diff`` and
        ``prob_diff`` as in `pahq.metrics.Metric`, but not negated.

    Raises:
        ValueError: The model is not good enough; the message has an example that it gets wrong.
    """
    check_range("batch", batch, 1, 1 << 20, "a batch has a prompt")
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        parts = [
            _scores(model, task, slice(first, first + batch), device)
            for first in range(0, len(task), batch)
        ]
    finally:
        for module in training:
            module.training = True
    each = {key: torch.cat([part[key] for part in parts]).double() for key in parts[0]}
    found = {key: float(values.mean()) for key, values in each.items()}
    measure = "pairwise" if "pairwise" in each else "top1"
    if min_accuracy is not None and not found[measure] >= min_accuracy:
        row = int(each[measure].argmin())
        prompt = task.meta["clean"][row] if "clean" in task.meta else task.clean[row].tolist()
        raise ValueError(
            f"task: expected one that {type(model).__name__} does, got {measure} accuracy "
            f"{found[measure]:.2f} in {task.meta.get('name', 'this one')}, below min_accuracy "
            f"{min_accuracy} (example {row} is wrong: {prompt!r}); its circuit would be of "
            "something else: take another model or task"
        )
    return found


def _scores(model: Any, task: Task, rows: slice, device: torch.device) -> dict[str, Any]:
    """Return scores ``(B,)`` of some examples."""
    at, index = task.positions[rows].unique(return_inverse=True)
    logits = model(
        input_ids=task.clean[rows].to(device), use_cache=False, logits_to_keep=at.to(device)
    ).logits
    index = index.to(device)
    logits = logits[torch.arange(len(index), device=device), index].float()
    right = on_device(task.answers[rows], device)
    found = {
        "top1": (logits.argmax(-1)[:, None] == right).any(-1),
        "nll": -log_prob(logits, right),
    }
    if task.wrong_answers is not None:
        wrong = on_device(task.wrong_answers[rows], device)
        found |= {
            "pairwise": best_logit(logits, right) > best_logit(logits, wrong),
            "logit_diff": mean_logit(logits, right) - mean_logit(logits, wrong),
            "prob_diff": prob(logits, right) - prob(logits, wrong),
        }
    return found
