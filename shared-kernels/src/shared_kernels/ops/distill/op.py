"""Registration of the distillation ops, and the gradients that they bring along."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd

from shared_kernels._library import declare
from shared_kernels.ops.distill import cpu, launch, reference
from shared_kernels.ops.distill.arguments import check_distinct, check_ids
from shared_kernels.ops.distill.reference import STATISTICS, accumulate_dtype


def _checked(run: Callable[..., Any]) -> Callable[..., Any]:
    """Look at ids first, where no compiler traces it, and keep autocast from rounding logits."""

    def checked(
        hidden: list[Tensor],
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        rows: Tensor,
        lm_weight: Tensor,
        kd_weight: Tensor,
        temperature: float,
        ignore_index: int,
        *args: Any,
    ) -> Any:
        used = min(len(weight), len(teacher_weight))
        check_ids("labels", labels, used, ignore_index, "pad with ignore_index, pass no others")
        check_ids("rows", rows, len(teacher_hidden), -1, "pass -1 where there is none")
        given = (labels, rows, lm_weight, kd_weight, temperature, ignore_index)
        with torch.autocast(weight.device.type, enabled=False):
            return run(hidden, weight, teacher_hidden, teacher_weight, *given, *args)

    return checked


def _fake(hidden: list[Tensor], weight: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    dtype = accumulate_dtype(weight.dtype)
    grad_hidden, grad_weight = args[-2:]
    stats = weight.new_empty(sum(part.shape[0] for part in hidden), len(STATISTICS), dtype=dtype)
    d_hidden = [part.new_empty(part.shape, dtype=dtype) for part in hidden if grad_hidden]
    return stats, d_hidden, weight.new_empty(weight.shape if grad_weight else 0, dtype=dtype)


linear_distillation = declare(
    "linear_distillation(Tensor[] hidden, Tensor weight, Tensor teacher_hidden,"
    " Tensor teacher_weight, Tensor labels, Tensor rows, Tensor lm_weight, Tensor kd_weight,"
    " float temperature, int ignore_index, SymInt chunk, bool grad_hidden, bool grad_weight)"
    " -> (Tensor, Tensor[], Tensor)",
    implementations={
        "reference": _checked(reference.linear_distillation),
        "split": _checked(cpu.linear_distillation),
        "triton": _checked(launch.linear_distillation),
    },
    fake=_fake,
    unsupported=launch.unsupported,
)


def _checked_sparse(run: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `_checked` does."""

    def checked(
        hidden: Tensor,
        weight: Tensor,
        indices: Tensor,
        log_probs: Tensor,
        labels: Tensor,
        active: Tensor,
        lm_weight: Tensor,
        kd_weight: Tensor,
        temperature: float,
        ignore_index: int,
        tail: bool,
        *args: Any,
    ) -> Any:
        used = len(weight)
        check_ids("labels", labels, used, ignore_index, "pad with ignore_index, pass no others")
        check_ids("indices", indices, used, -1, "pass -1 for what is no entry")
        check_distinct("indices", indices)
        given = (active, lm_weight, kd_weight, temperature, ignore_index, tail)
        with torch.autocast(weight.device.type, enabled=False):
            return run(hidden, weight, indices, log_probs, labels, *given, *args)

    return checked


def _fake_sparse(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(weight.dtype)
    grad_hidden, grad_weight = args[-2:]
    return (
        hidden.new_empty(hidden.shape[0], len(STATISTICS), dtype=dtype),
        hidden.new_empty(hidden.shape if grad_hidden else 0, dtype=dtype),
        hidden.new_empty(weight.shape if grad_weight else 0, dtype=dtype),
    )


sparse_distillation = declare(
    "sparse_distillation(Tensor hidden, Tensor weight, Tensor indices, Tensor log_probs,"
    " Tensor labels, Tensor active, Tensor lm_weight, Tensor kd_weight, float temperature,"
    " int ignore_index, bool tail, SymInt chunk, bool grad_hidden, bool grad_weight)"
    " -> (Tensor, Tensor, Tensor)",
    implementations={
        "reference": _checked_sparse(reference.sparse_distillation),
        "split": _checked_sparse(cpu.sparse_distillation),
        "triton": _checked_sparse(launch.sparse_distillation),
    },
    fake=_fake_sparse,
    unsupported=launch.sparse_unsupported,
)


#: Torch's own kernel for two dtypes is a third as fast as memory.
scaled = declare(
    "distillation_scaled(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    implementations={"reference": reference.scaled, "triton": launch.scaled},
    fake=lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype),
)


class WithGradients(autograd.Function):
    """A number whose gradients with respect to some tensors are known up to a factor.

    ``apply(value, factor, *inputs, *gradients)`` returns the value. The gradients are float32 or
    float64; backward multiplies them by factor and incoming gradient into new tensors of the
    inputs' dtypes, so that they are rounded once and what is kept is never written to. An empty
    gradient belongs to an input that needs none.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor, *tensors: Tensor) -> Tensor:
        """Keep the gradients."""
        inputs = tensors[: len(tensors) // 2]
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(factor, *tensors[len(inputs) :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of the inputs."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "distillation: expected backward without create_graph, got create_graph=True; the"
                " loss has no second derivative"
            )
        factor, *known = ctx.saved_tensors
        scale = factor * grads[0]
        wanted = ctx.needs_input_grad[2 : 2 + len(known)]
        found = [
            scaled(gradient, scale, dtype, "auto") if need else None
            for gradient, dtype, need in zip(known, ctx.dtypes, wanted, strict=True)
        ]
        return None, None, *found, *[None] * len(known)
