"""What a circuit is judged by: numbers of its final states, to be kept low."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message

if TYPE_CHECKING:
    from torch import Tensor

    from pahq.adapters import Adapter
    from pahq.tasks import Task

METRICS = ("kl", "logit_diff", "prob_diff", "nll")


@dataclass
class Metric:
    """A number of each row, from the residual stream where answers are given.

    - ``kl``: mean over examples of ``KL(p || q)`` in nats, p the model's distribution on the clean
      input. With dz the difference of logits it is ``log1p(sum p expm1(dz)) - sum p dz``, exact,
      and without the cancellation of two logarithms near 0.
    - ``logit_diff``: minus the mean difference of the logits of answer and wrong answer.
    - ``prob_diff``: minus the mean difference of their probabilities.
    - ``nll``: minus the mean log-probability of the answer.

    Args:
        name: One of these.
        adapter: Of the model.
        task: Whose answers count.
        final: ``(N, T, D)``, final states of the whole model on the clean input.
    """

    name: str
    adapter: Adapter
    task: Task
    final: Tensor

    def __post_init__(self) -> None:
        check_choice("metric", self.name, METRICS)
        if self.name in ("logit_diff", "prob_diff") and self.task.wrong_answers is None:
            remedy = "give wrong_answers, or use kl"
            raise ValueError(
                message("metric", "kl or nll without wrong answers", self.name, remedy)
            )
        self.rows = torch.arange(len(self.task), device=self.final.device)
        self.at = self.task.positions.to(self.final.device)
        clean = self.final[self.rows, self.at]
        self.normed = self.adapter.final_norm(clean)
        self.clean_logits = self.adapter.logits(clean)
        self.law = self.clean_logits.softmax(-1)

    def __call__(self, final: Tensor) -> Tensor:
        """Return the metric ``(M,)`` of final states ``(M, N, T, D)``."""
        x = final[:, self.rows, self.at]
        if self.name == "kl":
            return self._kl(x).mean(-1)
        logits = self.adapter.logits(x)
        right = self.task.answers.to(x.device)
        if self.name == "nll":
            law = logits.log_softmax(-1)
            return -law[:, self.rows, right].mean(-1)
        wrong: Any = self.task.wrong_answers
        scores = logits.softmax(-1) if self.name == "prob_diff" else logits
        return -(scores[:, self.rows, right] - scores[:, self.rows, wrong.to(x.device)]).mean(-1)

    def _kl(self, x: Tensor) -> Tensor:
        head = self.adapter.head
        if head.softcap is None:
            weight = head.module.weight.to(x.dtype)
            moved = (self.adapter.final_norm(x) - self.normed) @ weight.T * head.scale
        else:
            moved = self.adapter.logits(x) - self.clean_logits
        first = (self.law * moved).sum(-1)
        return torch.log1p((self.law * moved.expm1()).sum(-1)) - first
