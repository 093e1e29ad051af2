"""What an optimizer makes of gradients, forwards and backwards.

``forward`` is given the gradient of a step, takes decay, clipping and moments into account, and
returns the change of the weights; it remembers what the adjoint needs. ``reverse`` begins a pass
backwards. It gives a function of a step's number, the step and the adjoint w' of the weights after
it, ``(p,)``, or several as ``(Q, p)``. That returns the adjoint of the gradient, and that of the
weights before but for what goes through the gradient.

Gradients that are longer than ``max_norm`` are clipped as ``torch.nn.utils.clip_grad_norm_`` does:
their adjoint is of the form ``s P`` as SAM's is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_if.errors import UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam_if.trajectory import Step

    Reverse = Callable[[int, Step, Tensor], tuple[Tensor, Tensor]]

#: In the denominator of torch's clipping.
_CLIP_EPS = 1e-6


def dynamics_of(optimizer: torch.optim.Optimizer, max_norm: float | None) -> SGD | Adam:
    """Return the dynamics of an optimizer whose moments are empty.

    Raises:
        UnsupportedOptimizerError: Another class than SGD, Adam and AdamW of torch, or options that
            have no adjoint here or differ by group.
    """
    kind = type(optimizer)
    known = {torch.optim.SGD: ("momentum", "dampening", "nesterov"),
             torch.optim.Adam: ("betas", "eps", "decoupled_weight_decay"),
             torch.optim.AdamW: ("betas", "eps", "decoupled_weight_decay")}  # fmt: skip
    if kind not in known:
        raise UnsupportedOptimizerError(
            "optimizer: expected SGD, Adam or AdamW of torch inside of SAM, got "
            f"{kind.__module__}.{kind.__name__}; others have no adjoint here"
        )
    groups = optimizer.param_groups
    for name in known[kind]:
        if len({group[name] for group in groups}) > 1:
            raise UnsupportedOptimizerError(
                f"optimizer: expected one {name} for all parameters; groups may differ in lr and "
                "weight_decay"
            )
    for name in ("maximize", "amsgrad"):
        if any(group.get(name) for group in groups):
            raise UnsupportedOptimizerError(f"optimizer: expected no {name}; it has no adjoint")
    options: dict[str, Any] = {name: groups[0][name] for name in known[kind]}
    return (SGD if kind is torch.optim.SGD else Adam)(max_norm=max_norm, **options)


class _Clipping:
    """Keeps gradients no longer than a norm; None keeps them as they are."""

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm
        self._kept: list[Tensor] = []

    def forward(self, gradient: Tensor) -> Tensor:
        """Return a gradient, clipped."""
        if self.max_norm is None:
            return gradient
        self._kept.append(gradient)
        norm = torch.linalg.vector_norm(gradient)
        return gradient * (self.max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)

    def backward(self, index: int, v: Tensor) -> Tensor:
        """Return the adjoint of the gradient of a step by that of what was made of it."""
        if self.max_norm is None:
            return v
        gradient = self._kept[index]
        norm = torch.linalg.vector_norm(gradient)
        factor = self.max_norm / (norm + _CLIP_EPS)
        if factor >= 1:
            return v
        along = (v @ gradient).unsqueeze(-1) / (norm * (norm + _CLIP_EPS))
        return factor * (v - along * gradient)


class SGD:
    """``torch.optim.SGD``.

    ``m_{t+1} = beta m_t + (1 - tau) v_t``, the first is v_0, and ``w_{t+1} = w_t - eta_t m_{t+1}``,
    or with Nesterov's momentum ``w_t - eta_t (v_t + beta m_{t+1})``; v_t has ``lambda w_t`` in it.

    Args:
        momentum: beta.
        dampening: tau.
        nesterov: Whether it looks ahead.
        max_norm: Of gradients.
    """

    def __init__(
        self, momentum: float, dampening: float, nesterov: bool, max_norm: float | None = None
    ) -> None:
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self._clipping = _Clipping(max_norm)
        self._buffer: Tensor | None = None

    @property
    def remembers(self) -> bool:
        """Whether the adjoint needs what ``forward`` has seen."""
        return self._clipping.max_norm is not None

    def forward(self, step: Step, gradient: Tensor) -> Tensor:
        """Return the change of the weights, ``(p,)``."""
        change = self._clipping.forward(gradient) + step.weight_decay * step.weights
        if self.momentum:
            before = self._buffer
            self._buffer = (
                change if before is None
                else self.momentum * before + (1 - self.dampening) * change
            )  # fmt: skip
            change = change + self.momentum * self._buffer if self.nesterov else self._buffer
        return -step.lr * change

    def reverse(self) -> Reverse:
        """Begin a pass backwards; see the module."""
        buffer: Tensor | None = None

        def back(index: int, step: Step, w: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal buffer
            v = pull = -step.lr * w
            if self.momentum:
                inner = self.momentum * pull if self.nesterov else pull
                inner = inner if buffer is None else inner + buffer
                # the first buffer is the gradient itself
                v = inner if index == 0 else (1 - self.dampening) * inner
                v = v + pull if self.nesterov else v
                buffer = self.momentum * inner
            return self._clipping.backward(index, v), w + step.weight_decay * v

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
    """

    remembers = True

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        decoupled_weight_decay: bool,
        max_norm: float | None = None,
    ) -> None:
        self.betas, self.eps, self.decoupled = betas, eps, decoupled_weight_decay
        self._clipping = _Clipping(max_norm)
        # of each step: v, and both moments behind it
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def _scales(self, index: int) -> tuple[float, float]:
        """``1 - b1^t`` and the root of ``1 - b2^t``."""
        first, second = self.betas
        return 1 - first ** (index + 1), (1 - second ** (index + 1)) ** 0.5

    def forward(self, step: Step, gradient: Tensor) -> Tensor:
        """Return the change of the weights, ``(p,)``."""
        v = self._clipping.forward(gradient)
        if not self.decoupled:
            v = v + step.weight_decay * step.weights
        if self._kept:
            _, mean, square = self._kept[-1]
        else:
            mean = square = torch.zeros_like(v)
        first, second = self.betas
        mean = first * mean + (1 - first) * v
        square = second * square + (1 - second) * v * v
        self._kept.append((v, mean, square))
        one, root = self._scales(len(self._kept) - 1)
        change = -step.lr / one * mean / (square.sqrt() / root + self.eps)
        return change - step.lr * step.weight_decay * step.weights if self.decoupled else change

    def reverse(self) -> Reverse:
        """Begin a pass backwards; see the module."""
        means: Tensor | None = None
        squares: Tensor | None = None
        first, second = self.betas

        def back(index: int, step: Step, w: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal means, squares
            v, mean, square = self._kept[index]
            one, root = self._scales(index)
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
            return self._clipping.backward(index, adjoint), w

        return back
