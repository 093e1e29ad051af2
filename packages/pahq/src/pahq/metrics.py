"""What a circuit is judged by: numbers of its final states, to be kept low."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message
from shared_kernels.ops.patching.kl import kl_from_delta, mean_weight

from pahq.precision import behind

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pahq.adapters import Adapter
    from pahq.tasks import Task

METRICS = ("kl", "logit_diff", "prob_diff", "nll")


@dataclass(frozen=True)
class CustomMetric:
    """A metric of one's own.

    Args:
        function: Of logits ``(M, N, V)`` of M rows where the N examples give their answers, in
            float32 (float64 if the model is), a number for each row ``(M,)``. Each must depend on
            its own row only, for rows of one batch are other circuits. Scores by gradients want it
            differentiable.
        name: That results have.
        maximise: Whether it is to be kept high; ``Metric`` then gives its negative.
    """

    function: Callable[[Tensor], Tensor]
    name: str = "custom"
    maximise: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """Return what is to be kept low, ``(M,)``.

        Raises:
            TypeError: The function returns something else than a floating-point tensor.
            ValueError: It returns another shape.
        """
        found = self.function(logits)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            remedy = "return a number for each row"
            raise TypeError(message(f"metric {self.name}", "a floating tensor", found, remedy))
        if found.shape != logits.shape[:1]:
            remedy = "average over examples, not over rows"
            raise ValueError(
                message(f"metric {self.name}", f"shape ({len(logits)},)", found, remedy)
            )
        return -found if self.maximise else found


def as_metric(metric: str | CustomMetric | Callable[[Tensor], Tensor]) -> str | CustomMetric:
    """Return what `Metric` takes: one of `METRICS`, or a function in its wrapper.

    Raises:
        TypeError: Neither a name nor a function.
        ValueError: Another name.
    """
    if isinstance(metric, CustomMetric):
        return metric
    if isinstance(metric, str):
        check_choice("metric", metric, METRICS)
        return metric
    if not callable(metric):
        raise TypeError(message("metric", "a name or a function", metric, "see pahq.METRICS"))
    return CustomMetric(metric, getattr(metric, "__name__", "custom"))


def metric_name(metric: str | CustomMetric) -> str:
    """Return what results call a metric."""
    return metric if isinstance(metric, str) else metric.name


@dataclass
class Metric:
    """A number of each row, from the residual stream where answers are given.

    - ``kl``: mean over examples of ``KL(p || q)`` in nats, p the model's distribution on the clean
      input. It is computed from the differences of logits, without the cancellation of two
      logarithms near 0.
    - ``logit_diff``: minus the mean difference of the logits of answer and wrong answer; of sets,
      of their mean logits.
    - ``prob_diff``: minus the mean difference of their probabilities; of sets, of the sums of them.
    - ``nll``: minus the mean log-probability in nats of the answer; of a set, that one of it comes.

    Args:
        name: One of these, or a `CustomMetric`.
        adapter: Of the model.
        task: Whose answers count.
        final: ``(N, T, D)``, final states of the whole model on the clean input.

    Raises:
        ValueError: Another name, or differences for a task without wrong answers.
    """

    name: str | CustomMetric
    adapter: Adapter
    task: Task
    final: Tensor

    def __post_init__(self) -> None:
        self.name = as_metric(self.name)
        self.right = on_device(self.task.answers, self.final.device)
        self.wrong = None
        if self.task.wrong_answers is not None:
            self.wrong = on_device(self.task.wrong_answers, self.final.device)
        if self.name in ("logit_diff", "prob_diff") and self.wrong is None:
            remedy = "give wrong_answers, or use kl"
            raise ValueError(
                message("metric", "kl or nll without wrong answers", self.name, remedy)
            )
        self.rows = torch.arange(len(self.task), device=self.final.device)
        self.at = self.task.positions.to(self.final.device)
        self.clean = self.final[self.rows, self.at]
        if self.name == "kl":
            logits = self.adapter.logits(self.clean).detach()
            self.law = logits.softmax(-1)
            self.clean_logits = logits if self.adapter.head.softcap is not None else None
            self._head: tuple[Tensor, Tensor] | None = None

    def __call__(self, final: Tensor) -> Tensor:
        """Return the metric ``(M,)`` of final states ``(M, N, T, D)``."""
        return self.of(final[:, self.rows, self.at] - self.clean)[0]

    def of(self, moved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the metric of final states at answers, from how much they differ from clean ones.

        Args:
            moved: ``(M, N, D)``.

        Returns:
            The metric ``(M,)``, and that of each example ``(M, N)``, of which it is the mean; None
            for a `CustomMetric`.
        """
        if self.name == "kl":
            each = self._kl(moved)
            return each.mean(-1), each
        logits = self.adapter.logits(self.clean + moved)
        if isinstance(self.name, CustomMetric):
            return self.name(logits), None
        if self.name == "nll":
            each = -log_prob(logits, self.right)
        else:
            wrong: Any = self.wrong
            score = mean_logit if self.name == "logit_diff" else prob
            each = score(logits, wrong) - score(logits, self.right)
        return each.mean(-1), each

    def slopes(self, moved: Tensor) -> Tensor | None:
        """Return how far the metric moves with the final state of each example, at most.

        Args:
            moved: ``(N, D)``, of one row, as in `of`.

        Returns:
            Norms of its gradient ``(N,)``; None for a `CustomMetric` that has none.
        """
        moved = moved.detach()
        if self.name == "kl" and self.clean_logits is None:
            return self._kl_slope(moved).norm(dim=-1)
        with torch.enable_grad():
            moved.requires_grad_()
            value = self.of(moved[None])[0].sum()
            if not value.requires_grad:
                return None
            (slope,) = torch.autograd.grad(value, moved)
        return slope.norm(dim=-1)

    def _kl_slope(self, moved: Tensor) -> Tensor:
        """Return the gradient ``(N, D)``: of ``KL(p || q)`` by q's logits it is ``q - p``.

        Weights keep their dtype, and little is held that is as wide as the vocabulary.
        """
        norm, (weight, _), scale = (
            self.adapter.norm("final"),
            self._reads(),
            self.adapter.head.scale,
        )
        change = behind(norm, self.clean, moved[None]).values[0]
        logits = (change.to(weight.dtype) @ weight.T).to(moved.dtype).mul_(scale)
        # q is p times the exponential of these; what is not finite there is found by the metric
        q = logits.sub_(logits.amax(-1, keepdim=True)).exp_().mul_(self.law)
        q.div_(q.sum(-1, keepdim=True)).sub_(self.law).div_(len(q))
        slope = (q.to(weight.dtype) @ weight).to(moved.dtype).mul_(scale)
        with torch.enable_grad():
            final = (self.clean + moved).requires_grad_()
            return torch.autograd.grad(norm(final), final, slope)[0]

    def _reads(self) -> tuple[Tensor, Tensor]:
        """Return the head's weight, and its mean under the law."""
        if self._head is None:
            weight = self.adapter.head.module.weight.detach()
            # the kernel reads float32 and bfloat16
            weight = weight.to(self.clean.dtype) if weight.dtype == torch.float16 else weight
            self._head = weight, mean_weight(weight, self.law)
        return self._head

    def _kl(self, moved: Tensor) -> Tensor:
        head = self.adapter.head
        if self.clean_logits is not None:
            return _divergence(
                self.law, self.adapter.logits(self.clean + moved) - self.clean_logits
            )
        norm = self.adapter.norm("final")
        if torch.is_grad_enabled() and moved.requires_grad:
            normed = norm(self.clean + moved) - norm(self.clean)
            weight = head.module.weight.to(moved.dtype)
            return _divergence(self.law, normed @ weight.T * head.scale)
        weight, mean = self._reads()
        normed = behind(norm, self.clean, moved).values
        return kl_from_delta(normed, weight, self.law, mean, scale=head.scale)


def spread(whole: float, none: float, dtype: torch.dtype) -> float:
    """Return how far a metric of all edges is from that of none, 0 where it is rounding alone.

    Args:
        whole: Of all edges.
        none: Of none.
        dtype: Of the activations that they are made of.
    """
    rounding = 64 * torch.finfo(dtype).eps * max(abs(whole), abs(none))
    return whole - none if abs(whole - none) > rounding else 0.0


def _divergence(law: Tensor, moved: Tensor) -> Tensor:
    """Return ``KL(p || q)`` of laws ``(..., V)`` from p and the differences of their logits.

    With t the differences less their mean under p it is ``log sum p exp(t)``, and as ``sum p t`` is
    0, ``log1p(sum p (exp(t) - 1 - t))``: no term is negative, so that nothing cancels, and rounding
    of the mean counts squared only. A shift of all logits changes nothing.
    """
    t = moved - (law * moved).sum(-1, keepdim=True)
    # exp has no larger arguments than 88 in float32
    over = (t.amax(-1, keepdim=True) - 60).clamp(min=0)
    t = t - over
    grown = t.expm1()
    series = t * t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5 * (1 + t / 6))))
    terms = torch.where(over > 0, grown, torch.where(t.abs() < 0.1, series, grown - t))
    return torch.log1p((law * terms).sum(-1)) + over[..., 0]


# --- scores of sets of answers: logits (..., N, V), tokens (N, A), -1 where there is none ---------


def on_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Return answers ``(N,)`` or ``(N, A)`` as ``(N, A)`` on a device."""
    return tokens.reshape(len(tokens), -1).to(device)


def _of(logits: Tensor, tokens: Tensor, nothing: float) -> Tensor:
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    # the index -1 would be the last token
    found = logits[..., rows, tokens.clamp(min=0)]
    return found.masked_fill(tokens < 0, nothing)


def mean_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean logit ``(..., N)`` of a set."""
    return _of(logits, tokens, 0.0).sum(-1) / (tokens >= 0).sum(-1)


def best_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the largest logit ``(..., N)`` of a set."""
    return _of(logits, tokens, float("-inf")).amax(-1)


def prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the probability ``(..., N)`` of a set."""
    return _of(logits.softmax(-1), tokens, 0.0).sum(-1)


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability ``(..., N)`` of a set, without the underflow of probabilities."""
    return _of(logits, tokens, float("-inf")).logsumexp(-1) - logits.logsumexp(-1)
