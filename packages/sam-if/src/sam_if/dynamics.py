"""What an optimizer makes of gradients, forwards and backwards.

``forward`` is given the gradient of a step, takes decay, clipping and moments into account, and
returns the change of the weights and the moments behind it. ``reverse`` begins a pass backwards:
it gives a function of a step, of its gradient if ``needs_gradient``, and of the adjoint w' of the
weights after it, ``(p,)``, or several as ``(Q, p)``. That returns the adjoint of the gradient, and
that of the weights before but for what goes through the gradient.

Gradients that are longer than ``max_norm`` are clipped as ``torch.nn.utils.clip_grad_norm_`` does:
their adjoint is of the form ``s P`` as SAM's is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_if.errors import UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sam_if.records import Step

    Reverse = Callable[[Step, Tensor | None, Tensor], tuple[Tensor, Tensor]]

#: In the denominator of torch's clipping.
_CLIP_EPS = 1e-6
#: By class: options that have to be the same for all parameters.
_KNOWN = {
    torch.optim.SGD: ("momentum", "dampening", "nesterov"),
    torch.optim.Adam: ("betas", "eps", "decoupled_weight_decay"),
    torch.optim.AdamW: ("betas", "eps", "decoupled_weight_decay"),
}


def dynamics_of(
    kind: type[torch.optim.Optimizer], groups: Sequence[dict[str, Any]], max_norm: float | None
) -> SGD | Adam:
    """Return the dynamics of an optimizer.

    Args:
        kind: Its class.
        groups: Of parameters, with their options.
        max_norm: To which gradients are clipped; None if they are not.

    Raises:
        UnsupportedOptimizerError: Another class than SGD, Adam and AdamW of torch, or options that
            have no adjoint here or differ by group.
    """
    if kind not in _KNOWN:
        raise UnsupportedOptimizerError(
            "optimizer: expected SGD, Adam or AdamW of torch inside of SAM, got "
            f"{kind.__module__}.{kind.__name__}; others have no adjoint here"
        )
    for name in _KNOWN[kind]:
        if any(group[name] != groups[0][name] for group in groups):
            raise UnsupportedOptimizerError(
                f"optimizer: expected one {name} for all parameters; groups may differ in lr and "
                "weight_decay"
            )
    for name in ("maximize", "amsgrad"):
        if any(group.get(name) for group in groups):
            raise UnsupportedOptimizerError(f"optimizer: expected no {name}; it has no adjoint")
    options: dict[str, Any] = {name: groups[0][name] for name in _KNOWN[kind]}
    return (SGD if kind is torch.optim.SGD else Adam)(max_norm=max_norm, **options)


def _clipped(gradient: Tensor, max_norm: float | None) -> Tensor:
    """Return a gradient that is no longer than a norm."""
    if max_norm is None:
        return gradient
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)


def _clipped_adjoint(gradient: Tensor | None, max_norm: float | None, v: Tensor) -> Tensor:
    """Return the adjoint of a gradient by that of what was made of it."""
    if max_norm is None or gradient is None:
        return v
    norm = torch.linalg.vector_norm(gradient)
    factor = max_norm / (norm + _CLIP_EPS)
    along = (v @ gradient).unsqueeze(-1) / (norm * (norm + _CLIP_EPS))
    return torch.where(factor >= 1, v, factor * (v - along * gradient))


class SGD:
    """``torch.optim.SGD``.

    ``m_{t+1} = beta m_t + (1 - tau) v_t``, the first is v_0, and ``w_{t+1} = w_t - eta_t m_{t+1}``,
    or with Nesterov's momentum ``w_t - eta_t (v_t + beta m_{t+1})``; v_t has ``lambda w_t`` in it.

    Args:
        momentum: beta.
        dampening: tau.
        nesterov: Whether it looks ahead.
        max_norm: Of gradients.

    Attributes:
        moments: Names of what the optimizer keeps of each parameter.
    """

    def __init__(
        self, momentum: float, dampening: float, nesterov: bool, max_norm: float | None = None
    ) -> None:
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.max_norm = max_norm
        self.moments = ("momentum_buffer",) if momentum else ()

    @property
    def needs_gradient(self) -> bool:
        """Whether the adjoint needs the gradient itself."""
        return self.max_norm is not None

    def forward(self, step: Step, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the change of the weights, ``(p,)``, and the moments afterwards."""
        change = _clipped(gradient, self.max_norm) + step.weight_decay * step.weights
        if not self.momentum:
            return -step.lr * change, {}
        buffer = change
        if step.moments:
            before = step.moments["momentum_buffer"]
            buffer = self.momentum * before + (1 - self.dampening) * change
        change = change + self.momentum * buffer if self.nesterov else buffer
        return -step.lr * change, {"momentum_buffer": buffer}

    def reverse(self) -> Reverse:
        """Begin a pass backwards; see the module."""
        buffer: Tensor | None = None

        def back(step: Step, gradient: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal buffer
            v = pull = -step.lr * w
            if self.momentum:
                inner = self.momentum * pull if self.nesterov else pull
                inner = inner if buffer is None else inner + buffer
                # the first buffer is the gradient itself
                v = (1 - self.dampening) * inner if step.moments else inner
                v = v + pull if self.nesterov else v
                buffer = self.momentum * inner
            w = w + step.weight_decay * v
            return _clipped_adjoint(gradient, self.max_norm, v), w

        return back


class Adam:
    """``torch.optim.Adam`` and ``AdamW``.

    ``m = b1 m + (1 - b1) v``, ``q = b2 q + (1 - b2) v^2``, and the weights move by
    ``-eta m / (1 - b1^t) / (sqrt(q / (1 - b2^t)) + eps)``. Decay is in v, or decoupled:
    ``w (1 - eta lambda)`` comes first.

    Args:
        betas: b1 and b2.
        eps: In the denominator.
        decoupled_weight_decay: AdamW.
        max_norm: Of gradients.

    Attributes:
        moments: Names of what the optimizer keeps of each parameter.
    """

    needs_gradient = True
    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        decoupled_weight_decay: bool,
        max_norm: float | None = None,
    ) -> None:
        self.betas, self.eps, self.decoupled = betas, eps, decoupled_weight_decay
        self.max_norm = max_norm

    def _scales(self, step: Step) -> tuple[float, float]:
        """``1 - b1^t`` and the root of ``1 - b2^t``."""
        first, second = self.betas
        return 1 - first ** (step.taken + 1), (1 - second ** (step.taken + 1)) ** 0.5

    def _moved(self, step: Step, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return v and both moments behind it."""
        v = _clipped(gradient, self.max_norm)
        if not self.decoupled:
            v = v + step.weight_decay * step.weights
        mean = step.moments.get("exp_avg", torch.zeros_like(v))
        square = step.moments.get("exp_avg_sq", torch.zeros_like(v))
        first, second = self.betas
        return v, first * mean + (1 - first) * v, second * square + (1 - second) * v * v

    def forward(self, step: Step, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the change of the weights, ``(p,)``, and the moments afterwards."""
        _, mean, square = self._moved(step, gradient)
        one, root = self._scales(step)
        change = -step.lr / one * mean / (square.sqrt() / root + self.eps)
        if self.decoupled:
            change = change - step.lr * step.weight_decay * step.weights
        return change, {"exp_avg": mean, "exp_avg_sq": square}

    def reverse(self) -> Reverse:
        """Begin a pass backwards; see the module."""
        means: Tensor | None = None
        squares: Tensor | None = None
        first, second = self.betas

        def back(step: Step, gradient: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal means, squares
            assert gradient is not None
            v, mean, square = self._moved(step, gradient)
            one, root = self._scales(step)
            size = square.sqrt()
            below = size / root + self.eps
            pull = -step.lr / one * w
            inner = pull / below
            # where no gradient ever was, its square has no say
            outer = torch.where(size > 0, -pull * mean / (below * below * 2 * root * size), 0.0)
            inner = inner if means is None else inner + means
            outer = outer if squares is None else outer + squares
            adjoint = (1 - first) * inner + 2 * (1 - second) * v * outer
            means, squares = first * inner, second * outer
            if self.decoupled:
                w = w - step.lr * step.weight_decay * w
            else:
                w = w + step.weight_decay * adjoint
            return _clipped_adjoint(gradient, self.max_norm, adjoint), w

        return back
